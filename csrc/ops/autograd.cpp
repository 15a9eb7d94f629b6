// The torch::autograd::Functions of each loss. There are two roads to the gradient:
//
//   NAME           forward runs the loss, backward runs NAME_backward, which reads the input again
//   NAME_WithGrad  forward runs NAME_with_grad and saves the gradient; backward multiplies it by what forward has not
//                  foreseen of grad_output (csrc/ops/grad_in_forward.h)
//
// In an ordinary backward pass no graph is built, and the operators go straight to their kernels. With
// create_graph=True both roads take NAME_backward through the Autograd key, where csrc/ops/double_backward.cpp
// differentiates it. Backward runs on threads of autograd's own, which know nothing of the backend that forward had: a
// Function remembers it.
//
// What backward needs of forward's statistics are not outputs of a Function: compiled autograd refuses Functions with
// outputs that are not differentiable.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "checks.h"
#include "class_loss.h"
#include "dispatch.h"
#include "grad_in_forward.h"
#include "losses.h"

namespace fusedloss::autograd {

using at::Tensor;
using ops::CrossEntropyOutputs;
using ops::LossAndDivisor;
using ops::OptionalBool;
using ops::OptionalIndex;
using ops::OptionalTensor;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool wants_grad(const Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

void check_no_grad(const char* loss, const char* name, OptionalTensor tensor) {
  TORCH_CHECK(!ops::is_present(tensor) || !wants_grad(*tensor), loss, ": ", name,
              " is not differentiable, but requires grad; pass ", name, ".detach()");
}

std::optional<Tensor> to_optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

void remember_backend(AutogradContext* ctx) {
  ctx->saved_data.reserve(8);  // the first of what is kept there: else the table grows three times
  ctx->saved_data["backend"] = static_cast<int64_t>(ops::current_backend());
}

ops::Backend backend_of(AutogradContext* ctx) { return static_cast<ops::Backend>(ctx->saved_data["backend"].toInt()); }

Tensor to_tensor(OptionalTensor tensor) { return tensor.value_or(Tensor()); }

template <class Call>
auto call_below_autograd(Call call) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call();
}

// Backward calls an operator: below autograd when nobody will differentiate the result.
template <class Call>
auto call_backward(Call call) {
  return at::GradMode::is_enabled() ? call() : call_below_autograd(call);
}

void check_not_overwritten(const char* loss, const Tensor& input) {
  TORCH_CHECK(input.defined(), loss, ": double backward needs the input that inplace=True has overwritten");
}

// Absent gradients are undefined tensors, not the operators' empty ones.
Tensor masked(const Tensor& grad, bool wanted) { return wanted ? grad : Tensor(); }

// Autograd keeps no tensor that was made in inference mode, such as a teacher's probabilities: a copy takes its place.
void save(AutogradContext* ctx, variable_list tensors) {
  for (Tensor& tensor : tensors) {
    if (tensor.defined() && tensor.is_inference()) tensor = tensor.clone();
  }
  ctx->save_for_backward(std::move(tensors));
}

void save_options(AutogradContext* ctx, int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                  double z_loss, double logit_softcap) {
  ctx->saved_data["reduction"] = reduction;
  ctx->saved_data["ignore_index"] = ignore_index;
  ctx->saved_data["label_smoothing"] = label_smoothing;
  ctx->saved_data["z_loss"] = z_loss;
  ctx->saved_data["logit_softcap"] = logit_softcap;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, OptionalTensor weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing, double z_loss,
                               double logit_softcap, bool return_lse, bool upcast, CrossEntropyOutputs* outputs) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    *outputs = FUSEDLOSS_OPERATOR(cross_entropy)
                   .call(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap,
                         return_lse, upcast, std::nullopt, std::nullopt, false, /*statistics=*/true);
    const auto& [loss, lse, row_max, row_log_sum, divisor] = *outputs;
    remember_backend(ctx);
    if (has_hooks()) remember_version(ctx, logits);
    save(ctx, {logits, target, to_tensor(weight), row_max, row_log_sum, divisor});
    save_options(ctx, reduction, ignore_index, label_smoothing, z_loss, logit_softcap);
    ctx->set_materialize_grads(false);
    return return_lse ? variable_list{loss, lse} : variable_list{loss};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const ops::BackendGuard guard(backend_of(ctx));
    check_version("cross_entropy", ctx);
    const auto saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &target = saved[1], &row_max = saved[3], &row_log_sum = saved[4],
                 &divisor = saved[5];
    auto& options = ctx->saved_data;
    const int64_t reduction = options["reduction"].toInt();
    Tensor grad_loss = grads[0];
    if (!grad_loss.defined()) {
      grad_loss =
          reduction == 0 ? at::zeros_symint(row_max.sym_sizes(), row_max.options()) : at::zeros({}, row_max.options());
    }
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    auto [grad_logits, grad_target] = call_backward([&] {
      return FUSEDLOSS_OPERATOR(cross_entropy_backward)
          .call(grad_loss, grads.size() > 1 ? to_optional(grads[1]) : std::nullopt, logits, target,
                to_optional(saved[2]), row_max, row_log_sum, divisor, reduction, options["ignore_index"].toSymInt(),
                options["label_smoothing"].toDouble(), options["z_loss"].toDouble(),
                options["logit_softcap"].toDouble(), wanted);
    });
    return {masked(grad_logits, wanted[0]), masked(grad_target, wanted[1]), {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

struct CrossEntropyWithGrad : torch::autograd::Function<CrossEntropyWithGrad> {
  static constexpr const char* kName = "cross_entropy";

  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, OptionalTensor weight,
                        OptionalTensor grad_scale, int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                        double z_loss, double logit_softcap, bool upcast, bool inplace) {
    GradientInForward gradient(kName, logits, inplace, grad_scale, ops::empty_like_logits,
                               {{"target", target}, {"weight", weight}});
    Tensor loss = call_below_autograd([&] {
      return FUSEDLOSS_OPERATOR(cross_entropy_with_grad)
          .call(logits, target, weight, grad_scale, reduction, ignore_index, label_smoothing, z_loss, logit_softcap,
                upcast, gradient.grad(), gradient.scale());
    });
    remember_backend(ctx);
    const auto [grad, scale] = gradient.to_save(ctx);
    save(ctx,
         {grad, scale, target, to_tensor(weight), gradient.overwrites() ? Tensor() : for_double_backward(ctx, logits)});
    save_options(ctx, reduction, ignore_index, label_smoothing, z_loss, logit_softcap);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const ops::BackendGuard guard(backend_of(ctx));
    const auto saved = ctx->get_saved_variables();
    const bool ignores = !at::isFloatingType(saved[2].scalar_type());
    const Tensor grad = at::GradMode::is_enabled()
                            ? differentiable(ctx, grads[0], saved)
                            : GradientInForward::rescaled(kName, ctx, saved[0], saved[1], grads[0], ignores);
    return {grad, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }

 private:
  static Tensor differentiable(AutogradContext* ctx, const Tensor& grad_loss, const variable_list& saved) {
    check_not_overwritten(kName, saved[4]);
    const Tensor logits = from_forward(kName, ctx, saved[4]), &target = saved[2];
    const auto weight = to_optional(saved[3]);
    auto& options = ctx->saved_data;
    const int64_t reduction = options["reduction"].toInt();
    const c10::SymInt ignore_index = options["ignore_index"].toSymInt();
    const double label_smoothing = options["label_smoothing"].toDouble(), z_loss = options["z_loss"].toDouble(),
                 logit_softcap = options["logit_softcap"].toDouble();
    at::Tensor row_max, row_log_sum, divisor;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(std::ignore, std::ignore, row_max, row_log_sum, divisor) =
          FUSEDLOSS_OPERATOR(cross_entropy)
              .call(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap, false,
                    /*upcast=*/true, std::nullopt, std::nullopt, false, /*statistics=*/true);
    }
    auto [grad_logits, grad_target] =
        FUSEDLOSS_OPERATOR(cross_entropy_backward)
            .call(grad_loss, std::nullopt, logits, target, weight, row_max, row_log_sum, divisor, reduction,
                  ignore_index, label_smoothing, z_loss, logit_softcap, {true, false});
    return grad_logits;
  }
};

struct Nll : torch::autograd::Function<Nll> {
  static variable_list forward(AutogradContext* ctx, const Tensor& log_probs, const Tensor& target,
                               OptionalTensor weight, int64_t reduction, c10::SymInt ignore_index, bool upcast,
                               LossAndDivisor* outputs) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    *outputs = FUSEDLOSS_OPERATOR(nll).call(log_probs, target, weight, reduction, ignore_index, upcast);
    const auto& [loss, divisor] = *outputs;
    remember_backend(ctx);
    save(ctx, {log_probs, target, to_tensor(weight), divisor});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const ops::BackendGuard guard(backend_of(ctx));
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = call_backward([&] {
      return FUSEDLOSS_OPERATOR(nll_backward)
          .call(grads[0], saved[0], saved[1], to_optional(saved[2]), saved[3], ctx->saved_data["reduction"].toInt(),
                ctx->saved_data["ignore_index"].toSymInt());
    });
    return {grad, {}, {}, {}, {}, {}, {}};
  }
};

// A loss of one element. Weights is std::optional<Tensor> for each tensor behind the target; Operators names the loss
// and its three operators.
template <class Operators, class... Weights>
struct ElementwiseWithGrad : torch::autograd::Function<ElementwiseWithGrad<Operators, Weights...>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const Weights&... weights,
                        OptionalTensor grad_scale, int64_t reduction, OptionalIndex ignore_index, bool upcast,
                        bool inplace) {
    GradientInForward gradient(Operators::kName, input, inplace, grad_scale,
                               [](const Tensor& like) { return at::empty_like(like); },
                               {{"target", target}, {"weight", weights}...});
    Tensor loss = call_below_autograd([&] {
      return Operators::with_grad().call(input, target, weights..., grad_scale, reduction, ignore_index, upcast,
                                         gradient.grad(), gradient.scale());
    });
    remember_backend(ctx);
    const auto [grad, scale] = gradient.to_save(ctx);
    save(ctx, {grad, scale, gradient.overwrites() ? Tensor() : input, target, to_tensor(weights)...});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const ops::BackendGuard guard(backend_of(ctx));
    variable_list input_grads(7 + sizeof...(Weights));  // one for each argument of forward
    const auto saved = ctx->get_saved_variables();
    const bool ignores = !ctx->saved_data["ignore_index"].isNone();
    input_grads[0] = at::GradMode::is_enabled()
                         ? differentiable(ctx, grads[0], saved, std::index_sequence_for<Weights...>())
                         : GradientInForward::rescaled(Operators::kName, ctx, saved[0], saved[1], grads[0], ignores);
    return input_grads;
  }

 private:
  template <std::size_t... I>
  static Tensor differentiable(AutogradContext* ctx, const Tensor& grad_loss, const variable_list& saved,
                               std::index_sequence<I...>) {
    const Tensor &input = saved[2], &target = saved[3];
    check_not_overwritten(Operators::kName, input);
    const int64_t reduction = ctx->saved_data["reduction"].toInt();
    const auto ignore_index = ctx->saved_data["ignore_index"].template toOptional<c10::SymInt>();
    Tensor divisor;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(std::ignore, divisor) =
          Operators::forward(input, target, to_optional(saved[4 + I])..., reduction, ignore_index, /*upcast=*/true);
    }
    auto [grad_input, grad_target] = Operators::backward().call(grad_loss, input, target, to_optional(saved[4 + I])...,
                                                                divisor, reduction, ignore_index, {true, false});
    return grad_input;
  }
};

template <class Operators, class... Weights>
struct Elementwise : torch::autograd::Function<Elementwise<Operators, Weights...>> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const Weights&... weights, int64_t reduction, OptionalIndex ignore_index, bool upcast,
                               LossAndDivisor* outputs) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    *outputs = Operators::forward(input, target, weights..., reduction, ignore_index, upcast);
    const auto& [loss, divisor] = *outputs;
    remember_backend(ctx);
    save(ctx, {input, target, divisor, to_tensor(weights)...});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const ops::BackendGuard guard(backend_of(ctx));
    return backward(ctx, grads[0], std::index_sequence_for<Weights...>());
  }

  // What every dispatch of the loss under the Autograd key does.
  static LossAndDivisor dispatch(const Tensor& input, const Tensor& target, const Weights&... weights,
                                 int64_t reduction, OptionalIndex ignore_index, bool upcast, OptionalBool wish,
                                 OptionalTensor grad_scale, bool inplace) {
    if (!wants_grad(input) && !wants_grad(target)) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return Operators::forward(input, target, weights..., reduction, ignore_index, upcast);
    }
    const bool fits = Operators::kBounded || input.scalar_type() != at::kHalf;
    TORCH_CHECK_VALUE(fits || !wish.value_or(false), Operators::kName,
                      ": grad_in_forward=True needs another type than float16, whose range its gradient exceeds");
    const bool possible = fits && reduction != 0 && wants_grad(input) && !wants_grad(target);
    if (grad_in_forward(Operators::kName, wish, inplace, possible, input, grad_scale)) {
      return {ElementwiseWithGrad<Operators, Weights...>::apply(input, target, weights..., grad_scale, reduction,
                                                                ignore_index, upcast, inplace),
              Tensor()};
    }
    LossAndDivisor outputs;
    std::get<0>(outputs) = Elementwise::apply(input, target, weights..., reduction, ignore_index, upcast, &outputs)[0];
    return outputs;
  }

 private:
  template <std::size_t... I>
  static variable_list backward(AutogradContext* ctx, const Tensor& grad_loss, std::index_sequence<I...>) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1], &divisor = saved[2];
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    auto [grad_input, grad_target] = call_backward([&] {
      return Operators::backward().call(grad_loss, input, target, to_optional(saved[3 + I])..., divisor,
                                        ctx->saved_data["reduction"].toInt(),
                                        ctx->saved_data["ignore_index"].template toOptional<c10::SymInt>(), wanted);
    });
    variable_list input_grads(6 + sizeof...(Weights));  // one for each argument of forward
    input_grads[0] = masked(grad_input, wanted[0]);
    input_grads[1] = masked(grad_target, wanted[1]);
    return input_grads;
  }
};

struct BceWithLogits {
  static constexpr const char* kName = "binary_cross_entropy_with_logits";
  static constexpr bool kBounded = true;  // by weights and targets: the gradient
  template <class... Arguments>
  static LossAndDivisor forward(const Arguments&... arguments) {
    return FUSEDLOSS_OPERATOR(bce_with_logits).call(arguments..., std::nullopt, std::nullopt, false);
  }
  static const auto& with_grad() { return FUSEDLOSS_OPERATOR(bce_with_logits_with_grad); }
  static const auto& backward() { return FUSEDLOSS_OPERATOR(bce_with_logits_backward); }
};

struct Bce {
  static constexpr const char* kName = "binary_cross_entropy";
  static constexpr bool kBounded = false;
  template <class... Arguments>
  static LossAndDivisor forward(const Arguments&... arguments) {
    return FUSEDLOSS_OPERATOR(bce).call(arguments..., std::nullopt, std::nullopt);
  }
  static const auto& with_grad() { return FUSEDLOSS_OPERATOR(bce_with_grad); }
  static const auto& backward() { return FUSEDLOSS_OPERATOR(bce_backward); }
};

}  // namespace

CrossEntropyOutputs cross_entropy(const Tensor& logits, const Tensor& target, OptionalTensor weight, int64_t reduction,
                                  c10::SymInt ignore_index, double label_smoothing, double z_loss, double logit_softcap,
                                  bool return_lse, bool upcast, OptionalBool wish, OptionalTensor grad_scale,
                                  bool inplace, bool statistics) {
  ops::check_dense("cross_entropy", {{"input", logits}, {"target", target}, {"weight", weight}});
  check_no_grad("cross_entropy", "weight", weight);
  if (!wants_grad(logits) && !wants_grad(target)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return FUSEDLOSS_OPERATOR(cross_entropy)
        .call(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap, return_lse,
              upcast, std::nullopt, std::nullopt, false, statistics || is_compiling());
  }
  const bool possible = reduction != 0 && !return_lse && wants_grad(logits) && !wants_grad(target);
  if (grad_in_forward("cross_entropy", wish, inplace, possible, logits, grad_scale)) {
    return {CrossEntropyWithGrad::apply(logits, target, weight, grad_scale, reduction, ignore_index, label_smoothing,
                                        z_loss, logit_softcap, upcast, inplace),
            Tensor(), Tensor(), Tensor(), Tensor()};
  }
  CrossEntropyOutputs outputs;
  const auto differentiable = CrossEntropy::apply(logits, target, weight, reduction, ignore_index, label_smoothing,
                                                  z_loss, logit_softcap, return_lse, upcast, &outputs);
  std::get<0>(outputs) = differentiable[0];
  if (return_lse) std::get<1>(outputs) = differentiable[1];
  return outputs;
}

LossAndDivisor nll(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   c10::SymInt ignore_index, bool upcast) {
  ops::check_dense("nll_loss", {{"input", log_probs}, {"target", target}, {"weight", weight}});
  check_no_grad("nll_loss", "weight", weight);
  if (!wants_grad(log_probs)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return FUSEDLOSS_OPERATOR(nll).call(log_probs, target, weight, reduction, ignore_index, upcast);
  }
  LossAndDivisor outputs;
  std::get<0>(outputs) = Nll::apply(log_probs, target, weight, reduction, ignore_index, upcast, &outputs)[0];
  return outputs;
}

LossAndDivisor bce_with_logits(const Tensor& input, const Tensor& target, OptionalTensor weight,
                               OptionalTensor pos_weight, int64_t reduction, OptionalIndex ignore_index, bool upcast,
                               OptionalBool wish, OptionalTensor grad_scale, bool inplace) {
  ops::check_dense("binary_cross_entropy_with_logits",
                   {{"input", input}, {"target", target}, {"weight", weight}, {"pos_weight", pos_weight}});
  check_no_grad("binary_cross_entropy_with_logits", "weight", weight);
  check_no_grad("binary_cross_entropy_with_logits", "pos_weight", pos_weight);
  using Loss = Elementwise<BceWithLogits, std::optional<Tensor>, std::optional<Tensor>>;
  return Loss::dispatch(input, target, weight, pos_weight, reduction, ignore_index, upcast, wish, grad_scale, inplace);
}

LossAndDivisor bce(const Tensor& input, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   OptionalIndex ignore_index, bool upcast, OptionalBool wish, OptionalTensor grad_scale) {
  ops::check_dense("binary_cross_entropy", {{"input", input}, {"target", target}, {"weight", weight}});
  check_no_grad("binary_cross_entropy", "weight", weight);
  using Loss = Elementwise<Bce, std::optional<Tensor>>;
  return Loss::dispatch(input, target, weight, reduction, ignore_index, upcast, wish, grad_scale, false);
}

}  // namespace fusedloss::autograd
