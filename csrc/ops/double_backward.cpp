// Second derivatives: the gradient of the backward operators.
//
// A backward operator computes, in one fused pass, what differentiating its loss computes step by step. Under
// create_graph=True its own gradient is wanted, which is rare: the loss is rebuilt of ATen's operators and
// differentiated twice, so derivatives of any order are native's. No kernel is launched, and both namespaces share the
// formulas.
//
// The arguments may depend on each other: the gradient that flows into loss^2 depends on the logits, and so may the
// target. Each formula therefore starts from fresh aliases of its arguments. Differentiated by the arguments
// themselves, it would count those paths, which autograd adds by itself, a second time.

#include "double_backward.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "calls.h"
#include "losses.h"

namespace fusedloss::ops {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// What a backward operator is given for each output of its loss.
const std::vector<std::string> kGradOutputs{"grad_loss", "grad_lse", "grad_entropy"};

bool is_defined(const c10::IValue& value) { return value.isTensor() && value.toTensor().defined(); }

// The arguments of a backward operator by their names in the schema (csrc/register.cpp).
class Arguments {
 public:
  // As forward has saved them, the tensors as aliases.
  Arguments(AutogradContext* ctx, const c10::FunctionSchema& schema) {
    const variable_list saved = ctx->get_saved_variables();
    for (const c10::Argument& argument : schema.arguments()) {
      const auto option = ctx->saved_data.find(argument.name());
      if (option != ctx->saved_data.end()) {
        values_[argument.name()] = option->second;
      } else {
        const Tensor& tensor = saved[tensors_.size()];
        values_[argument.name()] = tensor.view_as(tensor);
        tensors_.push_back(argument.name());
      }
    }
  }

  // The names of those that are tensors.
  const std::vector<std::string>& names() const { return tensors_; }
  template <class Options>
  Options options() const {
    return options_in<Options>(values_);
  }
  int64_t reduction() const { return values_.at("reduction").toInt(); }
  // Whether the operator was asked for its result i.
  bool is_wanted(size_t i) const {
    const auto mask = values_.find("output_mask");
    return mask == values_.end() || mask->second.toBoolList()[i];
  }

  // Undefined where there is none: the operator has no such argument, or the call has left it out.
  Tensor tensor(const std::string& name) const {
    const auto found = values_.find(name);
    return found != values_.end() && is_defined(found->second) ? found->second.toTensor() : Tensor();
  }
  variable_list tensors(const std::vector<std::string>& names) const {
    variable_list found;
    for (const std::string& name : names) found.push_back(tensor(name));
    return found;
  }
  void set(const std::string& name, const Tensor& tensor) { values_[name] = tensor; }

  // A tensor of the loss. A float32 loss of half precision is autocast's, where native casts every operand first.
  Tensor operand(const std::string& name) const {
    const Tensor value = tensor(name);
    const bool widens = value.defined() && tensor("grad_loss").scalar_type() == at::kFloat &&
                        (value.scalar_type() == at::kHalf || value.scalar_type() == at::kBFloat16);
    return widens ? value.to(at::kFloat) : value;
  }
  std::optional<Tensor> weight(const std::string& name = "weight") const {
    const Tensor value = operand(name);
    return value.defined() ? std::optional(value) : std::nullopt;
  }

 private:
  std::unordered_map<std::string, c10::IValue> values_;
  std::vector<std::string> tensors_;
};

// The losses in plain torch, like fusedloss/reference.py: each takes its backward operator's arguments, and returns the
// differentiable outputs, for which these operators are given kGradOutputs.

// The divisor of the mean is among the arguments: forward has counted.
Tensor reduced(const Arguments& of, const Tensor& loss) {
  if (of.reduction() == at::Reduction::None) return loss;
  // In half precision the sum, or its divisor, may be infinite where the mean is not.
  const Tensor total = loss.sum(loss.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return of.reduction() == at::Reduction::Sum ? total : total / of.tensor("divisor").to(total.scalar_type());
}

// Native takes uint8 for (N, C) only, and int32 never.
Tensor class_indices(const Tensor& target) {
  return at::isFloatingType(target.scalar_type()) ? target : target.to(at::kLong);
}

// A class of no probability adds nothing, also where its logarithm is infinite.
Tensor entropy(const Tensor& logits, int64_t classes) {
  const Tensor log_p = at::log_softmax(logits, classes);
  const Tensor finite = at::where(log_p.eq(-std::numeric_limits<double>::infinity()), at::zeros_like(log_p), log_p);
  return -(log_p.exp() * finite).sum(classes);
}

variable_list cross_entropy(const Arguments& of) {
  Tensor logits = of.operand("logits");
  const Tensor target = class_indices(of.operand("target"));
  const auto options = of.options<CrossEntropyOptions>();
  const double cap = options.logit_softcap;
  if (options.logit_scale != 1) logits = logits * options.logit_scale;
  if (cap != 0) logits = cap * at::tanh(logits / cap);
  const int64_t classes = logits.dim() == 1 ? 0 : 1;
  const Tensor wide = logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
  const Tensor lse = at::logsumexp(wide, classes);
  const Tensor weights = of.tensor("sample_weight");
  const bool native_mean = !weights.defined() && !of.tensor("denominator").defined();
  Tensor loss =
      at::cross_entropy_loss_symint(logits, target, of.weight(), native_mean ? of.reduction() : at::Reduction::None,
                                    options.ignore_index, options.label_smoothing);
  Tensor counts = at::ones_like(lse, lse.options().dtype(at::kBool));
  if (!at::isFloatingType(target.scalar_type())) {
    counts = target.reshape_symint(lse.sym_sizes()).ne(options.ignore_index);
  }
  const auto of_counting = [&](const Tensor& value) { return at::where(counts, value, at::zeros_like(value)); };
  const auto z_loss = [&] { return of_counting(options.z_loss * lse.square()); };
  if (native_mean) {
    if (options.z_loss != 0) loss = loss + reduced(of, z_loss()).to(loss.scalar_type());
  } else {
    const auto type = loss.scalar_type();
    loss = loss.reshape_symint(lse.sym_sizes());
    if (options.z_loss != 0) loss = loss + z_loss();
    if (weights.defined()) loss = loss * of_counting(weights);
    loss = reduced(of, loss).to(type);
  }
  return {loss, lse, entropy(wide, classes)};
}

variable_list linear_cross_entropy(const Arguments& of) {
  Tensor input = of.tensor("input");
  const Tensor weight = of.tensor("linear_weight"), bias = of.tensor("linear_bias"), target = of.tensor("target");
  const auto sizes = weight.sym_sizes();
  // An ignored row, where nothing flows back into it, may hold anything.
  if (!at::isFloatingType(target.scalar_type()) && !of.tensor("grad_lse").defined() &&
      !of.tensor("grad_entropy").defined()) {
    Tensor ignored = target.to(at::kLong).eq(of.options<CrossEntropyOptions>().ignore_index);
    if (ignored.dim() > 1) ignored = ignored.flatten(1).all(1);
    input = input.masked_fill(ignored.unsqueeze(1), 0);
  }
  Tensor logits = at::linear(input, weight.flatten(0, -2), bias.defined() ? bias.flatten() : bias);
  if (sizes.size() > 2) logits = logits.unflatten_symint(1, sizes.slice(0, sizes.size() - 1));
  Arguments of_logits = of;
  of_logits.set("logits", logits);
  return cross_entropy(of_logits);
}

variable_list nll(const Arguments& of) {
  // Native's own backward refuses channels_last.
  return {at::nll_loss_nd_symint(of.operand("log_probs").contiguous(), class_indices(of.operand("target")), of.weight(),
                                 of.reduction(), of.options<Nll::Options>().ignore_index)};
}

// A loss of one element, without the elements whose target is ignored. `unreduced` is the loss of each of them.
template <class Unreduced>
variable_list elementwise(const Arguments& of, Unreduced unreduced) {
  Tensor input = of.operand("input"), target = of.operand("target"), ignored;
  if (const auto index = of.options<ElementwiseOptions>().ignore_index) ignored = target.eq(*index);
  if (!at::isFloatingType(target.scalar_type())) target = target.to(input.scalar_type());
  if (!ignored.defined()) return {reduced(of, unreduced(input, target))};
  // A value that every loss accepts, so that nothing an ignored element holds, NaN included, meets a formula.
  input = at::where(ignored, at::full({}, 0.5, input.options()), input);
  target = at::where(ignored, at::full({}, 0.5, target.options()), target);
  const Tensor loss = unreduced(input, target);
  return {reduced(of, at::where(ignored, at::zeros_like(loss), loss))};
}

variable_list bce_with_logits(const Arguments& of) {
  return elementwise(of, [&](const Tensor& input, const Tensor& target) {
    return at::binary_cross_entropy_with_logits(input, target, of.weight(), of.weight("pos_weight"),
                                                at::Reduction::None);
  });
}

variable_list bce(const Arguments& of) {
  return elementwise(of, [&](const Tensor& input, const Tensor& target) {
    auto weight = of.weight();
    if (weight) weight = weight->expand_symint(target.sym_sizes());
    return at::binary_cross_entropy(input, target, weight, at::Reduction::None);
  });
}

using Loss = variable_list (*)(const Arguments&);

const std::unordered_map<std::string, Loss> kLosses{{"cross_entropy_backward", cross_entropy},
                                                    {"linear_cross_entropy_backward", linear_cross_entropy},
                                                    {"nll_backward", nll},
                                                    {"bce_with_logits_backward", bce_with_logits},
                                                    {"bce_backward", bce}};

bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

// torch::autograd::grad, where outputs and cotangents may be absent and outputs may be constants.
variable_list differentiate(const variable_list& outputs, const variable_list& inputs, const variable_list& cotangents,
                            bool create_graph) {
  variable_list of, given;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!requires_grad(outputs[i]) || !cotangents[i].defined()) continue;
    of.push_back(outputs[i]);
    given.push_back(cotangents[i].to(outputs[i].scalar_type()));
  }
  if (of.empty() || inputs.empty()) return variable_list(inputs.size());
  variable_list gradients;
  enter_engine(
      [&] { gradients = torch::autograd::grad(of, inputs, given, create_graph, create_graph, /*allow_unused=*/true); });
  return gradients;
}

struct DoubleBackward : torch::autograd::Function<DoubleBackward> {
  // tensors: those among the operator's arguments, which the stack holds.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const c10::OperatorHandle& op,
                               torch::jit::Stack* stack) {
    const auto& arguments = op.schema().arguments();
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
      if (!is_defined(value)) ctx->saved_data[arguments[i].name()] = value;
    }
    ctx->saved_data["operator"] = op.schema().name();
    ctx->save_for_backward(tensors.vec());
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
    variable_list results;
    for (const c10::IValue& value : torch::jit::pop(*stack, op.schema().returns().size())) {
      results.push_back(value.toTensor());
    }
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode building_graphs(true);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // the types are forward's
    const std::string& name = ctx->saved_data["operator"].toStringRef();
    const auto found = kLosses.find(name.substr(name.rfind(':') + 1));
    TORCH_CHECK_NOT_IMPLEMENTED(
        found != kLosses.end(),
        "second derivatives of a loss whose classes are shared between ranks are not supported");
    const Loss loss = found->second;
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
    Arguments values(ctx, op.schema());

    // A result named grad_NAME is the gradient of the argument NAME.
    std::vector<std::string> wanted, sources = kGradOutputs;
    variable_list of_wanted;
    for (size_t i = 0; i < cotangents.size(); ++i) {
      sources.push_back(op.schema().returns()[i].name().substr(std::strlen("grad_")));
      if (!values.is_wanted(i)) continue;
      wanted.push_back(sources.back());
      of_wanted.push_back(cotangents[i]);
    }
    std::erase_if(sources, [&](const std::string& source) { return !requires_grad(values.tensor(source)); });
    const variable_list from = values.tensors(sources);

    // What the operator has returned, as a differentiable function of its arguments.
    for (const std::string& input : wanted) {
      const Tensor value = values.tensor(input);
      if (!value.requires_grad()) values.set(input, value.detach().requires_grad_());
    }
    const variable_list first =
        differentiate(loss(values), values.tensors(wanted), values.tensors(kGradOutputs), /*create_graph=*/true);
    const variable_list second = differentiate(first, from, of_wanted, create_graph);

    if (!from.empty() && !from[0].is_meta()) Calls::of_operator(name).count(Route::second_derivative);

    variable_list results;
    for (const std::string& tensor : values.names()) {
      const auto source = std::find(sources.begin(), sources.end(), tensor);
      results.push_back(source == sources.end() ? Tensor() : second[source - sources.begin()]);
    }
    results.resize(results.size() + 2);  // forward's other arguments are no tensors
    return results;
  }
};

}  // namespace

EnterEngine enter_engine = [](const std::function<void()>& run) { run(); };

void backward_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  variable_list tensors;
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (is_defined(value)) tensors.push_back(value.toTensor());
  }
  const variable_list results = DoubleBackward::apply(at::TensorList(tensors), op, stack);
  for (const Tensor& result : results) torch::jit::push(*stack, result);
}

}  // namespace fusedloss::ops
