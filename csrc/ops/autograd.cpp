// One torch::autograd::Function for each loss: forward runs the operator below autograd and saves what the gradient
// needs; backward calls the backward operator through the dispatcher.
//
// In an ordinary backward pass no graph is built, and the backward operator goes straight to its kernel. With
// create_graph=True it passes the Autograd key, where fusedloss/double_backward.py differentiates it.

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "checks.h"
#include "dispatch.h"
#include "losses.h"

namespace fusedloss::autograd {

using at::Tensor;
using ops::CrossEntropyOutputs;
using ops::LossAndDivisor;
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

Tensor to_tensor(OptionalTensor tensor) { return tensor.value_or(Tensor()); }

// Backward calls an operator: below autograd when nobody will differentiate the result.
template <class Call>
auto call_backward(Call call) {
  if (at::GradMode::is_enabled()) return call();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call();
}

// Absent gradients are undefined tensors, not the operators' empty ones.
Tensor masked(const Tensor& grad, bool wanted) { return wanted ? grad : Tensor(); }

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, OptionalTensor weight,
                               int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
                               double logit_softcap, bool return_lse, bool upcast) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, lse, row_max, row_log_sum, divisor] =
        FUSEDLOSS_OPERATOR(cross_entropy)
            .call(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap, return_lse,
                  upcast);
    ctx->save_for_backward({logits, target, to_tensor(weight), row_max, row_log_sum, divisor});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["z_loss"] = z_loss;
    ctx->saved_data["logit_softcap"] = logit_softcap;
    variable_list constants{row_max, row_log_sum, divisor};
    if (!return_lse) constants.push_back(lse);
    ctx->mark_non_differentiable(constants);
    ctx->set_materialize_grads(false);
    return {loss, lse, row_max, row_log_sum, divisor};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
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
          .call(grad_loss, to_optional(grads[1]), logits, target, to_optional(saved[2]), row_max, row_log_sum, divisor,
                reduction, options["ignore_index"].toInt(), options["label_smoothing"].toDouble(),
                options["z_loss"].toDouble(), options["logit_softcap"].toDouble(), wanted);
    });
    return {masked(grad_logits, wanted[0]), masked(grad_target, wanted[1]), {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

struct Nll : torch::autograd::Function<Nll> {
  static variable_list forward(AutogradContext* ctx, const Tensor& log_probs, const Tensor& target,
                               OptionalTensor weight, int64_t reduction, int64_t ignore_index, bool upcast) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, divisor] = FUSEDLOSS_OPERATOR(nll).call(log_probs, target, weight, reduction, ignore_index, upcast);
    ctx->save_for_backward({log_probs, target, to_tensor(weight), divisor});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->mark_non_differentiable({divisor});
    return {loss, divisor};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor grad = call_backward([&] {
      return FUSEDLOSS_OPERATOR(nll_backward)
          .call(grads[0], saved[0], saved[1], to_optional(saved[2]), saved[3], ctx->saved_data["reduction"].toInt(),
                ctx->saved_data["ignore_index"].toInt());
    });
    return {grad, {}, {}, {}, {}, {}};
  }
};

// A loss of one element. Weights is std::optional<Tensor> for each tensor behind the target; Operators names the loss
// and its two operators.
template <class Operators, class... Weights>
struct Elementwise : torch::autograd::Function<Elementwise<Operators, Weights...>> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const Weights&... weights, int64_t reduction, OptionalIndex ignore_index, bool upcast) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, divisor] = Operators::forward().call(input, target, weights..., reduction, ignore_index, upcast);
    ctx->save_for_backward({input, target, divisor, to_tensor(weights)...});
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->mark_non_differentiable({divisor});
    return {loss, divisor};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return backward(ctx, grads[0], std::index_sequence_for<Weights...>());
  }

  // What every dispatch of the loss under the Autograd key does.
  static LossAndDivisor dispatch(const Tensor& input, const Tensor& target, const Weights&... weights,
                                 int64_t reduction, OptionalIndex ignore_index, bool upcast) {
    if (!wants_grad(input) && !wants_grad(target)) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return Operators::forward().call(input, target, weights..., reduction, ignore_index, upcast);
    }
    const auto out = Elementwise::apply(input, target, weights..., reduction, ignore_index, upcast);
    return {out[0], out[1]};
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
                                        ctx->saved_data["ignore_index"].template toOptional<int64_t>(), wanted);
    });
    variable_list input_grads(5 + sizeof...(Weights));  // one for each argument of forward
    input_grads[0] = masked(grad_input, wanted[0]);
    input_grads[1] = masked(grad_target, wanted[1]);
    return input_grads;
  }
};

struct BceWithLogits {
  static const auto& forward() { return FUSEDLOSS_OPERATOR(bce_with_logits); }
  static const auto& backward() { return FUSEDLOSS_OPERATOR(bce_with_logits_backward); }
};

struct Bce {
  static const auto& forward() { return FUSEDLOSS_OPERATOR(bce); }
  static const auto& backward() { return FUSEDLOSS_OPERATOR(bce_backward); }
};

}  // namespace

CrossEntropyOutputs cross_entropy(const Tensor& logits, const Tensor& target, OptionalTensor weight, int64_t reduction,
                                  int64_t ignore_index, double label_smoothing, double z_loss, double logit_softcap,
                                  bool return_lse, bool upcast) {
  check_no_grad("cross_entropy", "weight", weight);
  if (!wants_grad(logits) && !wants_grad(target)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return FUSEDLOSS_OPERATOR(cross_entropy)
        .call(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap, return_lse,
              upcast);
  }
  const auto out = CrossEntropy::apply(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss,
                                       logit_softcap, return_lse, upcast);
  return {out[0], out[1], out[2], out[3], out[4]};
}

LossAndDivisor nll(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   int64_t ignore_index, bool upcast) {
  check_no_grad("nll_loss", "weight", weight);
  if (!wants_grad(log_probs)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return FUSEDLOSS_OPERATOR(nll).call(log_probs, target, weight, reduction, ignore_index, upcast);
  }
  const auto out = Nll::apply(log_probs, target, weight, reduction, ignore_index, upcast);
  return {out[0], out[1]};
}

LossAndDivisor bce_with_logits(const Tensor& input, const Tensor& target, OptionalTensor weight,
                               OptionalTensor pos_weight, int64_t reduction, OptionalIndex ignore_index, bool upcast) {
  check_no_grad("binary_cross_entropy_with_logits", "weight", weight);
  check_no_grad("binary_cross_entropy_with_logits", "pos_weight", pos_weight);
  using Loss = Elementwise<BceWithLogits, std::optional<Tensor>, std::optional<Tensor>>;
  return Loss::dispatch(input, target, weight, pos_weight, reduction, ignore_index, upcast);
}

LossAndDivisor bce(const Tensor& input, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   OptionalIndex ignore_index, bool upcast) {
  check_no_grad("binary_cross_entropy", "weight", weight);
  using Loss = Elementwise<Bce, std::optional<Tensor>>;
  return Loss::dispatch(input, target, weight, reduction, ignore_index, upcast);
}

}  // namespace fusedloss::autograd
