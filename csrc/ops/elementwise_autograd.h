// The losses of one element with their gradients.

#pragma once

#include <ATen/ops/empty_like.h>

#include "autograd.h"
#include "elementwise_op.h"

namespace fusedloss::ops {

template <class Loss>
struct ElementwiseFunction : LossFunction<ElementwiseFunction<Loss>> {
  static Tensor evaluate(AutogradContext* ctx, const Tensor& input, const Tensor& target, OptionalTensor weight,
                         OptionalTensor pos_weight, const ElementwiseOptions& options, bool upcast,
                         LossAndDivisor* outputs) {
    *outputs = Operator<&Loss::forward>::call_below_autograd(input, target, ElementwiseWeights{weight, pos_weight},
                                                             options, TrainingOptions{.upcast = upcast});
    const auto& [loss, divisor] = *outputs;
    save(ctx, {input, target, weight.value_or(Tensor()), pos_weight.value_or(Tensor()), divisor}, options);
    return loss;
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    const auto [input, target, weight, pos_weight, divisor] = saved_tensors<5>(ctx);
    const ElementwiseWeights weights{to_optional(weight), to_optional(pos_weight)};
    return Operator<&Loss::backward>::call_in_backward(grads[0], input, target, weights, divisor,
                                                       saved_options<ElementwiseOptions>(ctx), wanted);
  }
};

template <class Loss>
struct ElementwiseWithGrad : LossFunction<ElementwiseWithGrad<Loss>> {
  static Tensor evaluate(AutogradContext* ctx, const Tensor& input, const Tensor& target, OptionalTensor weight,
                         OptionalTensor pos_weight, const ElementwiseOptions& options,
                         const TrainingOptions& training) {
    GradientInForward gradient(Loss::kLoss.name, input, training,
                               [](const Tensor& like) { return at::empty_like(like); },
                               {{"target", target}, {"weight", weight}, {"pos_weight", pos_weight}});
    Tensor loss = Operator<&Loss::with_grad>::call_below_autograd(input, target, ElementwiseWeights{weight, pos_weight},
                                                                  training.grad_scale, options, training.upcast,
                                                                  gradient.grad(), gradient.scale());
    const auto [grad, scale] = gradient.to_save(ctx);
    save(ctx,
         {grad, scale, gradient.overwrites() ? Tensor() : input, target, weight.value_or(Tensor()),
          pos_weight.value_or(Tensor())},
         options);
    return loss;
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    const auto [grad, scale, input, target, weight, pos_weight] = saved_tensors<6>(ctx);
    const auto options = saved_options<ElementwiseOptions>(ctx);
    if (!at::GradMode::is_enabled()) {
      const bool ignores = options.ignore_index.has_value();
      return {GradientInForward::rescaled(Loss::kLoss.name, ctx, grad, scale, grads[0], ignores), Tensor()};
    }
    check_not_overwritten(Loss::kLoss.name, input);
    const ElementwiseWeights weights{to_optional(weight), to_optional(pos_weight)};
    const auto [loss, divisor] =
        Operator<&Loss::forward>::call_below_autograd(input, target, weights, options, TrainingOptions{.upcast = true});
    return Operator<&Loss::backward>::call(grads[0], input, target, weights, divisor, options, wanted);
  }
};

template <class Loss>
LossAndDivisor Elementwise<Loss>::autograd(const Tensor& input, const Tensor& target, const Weights& weights,
                                           const ElementwiseOptions& options, const Training& training) {
  const char* const name = Loss::kLoss.name;
  const auto& [weight, pos_weight] = static_cast<const ElementwiseWeights&>(weights);
  check_dense(name, {{"input", input}, {"target", target}, {"weight", weight}, {"pos_weight", pos_weight}});
  check_no_grad(name, "weight", weight);
  check_no_grad(name, "pos_weight", pos_weight);
  if (!wants_grad(input) && !wants_grad(target)) {
    return Operator<&Elementwise::forward>::call_below_autograd(input, target, weights, options,
                                                                TrainingOptions{.upcast = training.upcast});
  }
  const bool fits = !Loss::kLoss.probabilities || input.scalar_type() != at::kHalf;
  TORCH_CHECK_VALUE(fits || !training.grad_in_forward.value_or(false), name,
                    ": grad_in_forward=True needs another type than float16, whose range its gradient exceeds");
  const bool possible = fits && options.reduction != Reduction::none && wants_grad(input) && !wants_grad(target);
  if (grad_in_forward(name, training, possible, input)) {
    return {ElementwiseWithGrad<Elementwise>::apply(input, target, weight, pos_weight, options, training), Tensor()};
  }
  LossAndDivisor outputs;
  std::get<0>(outputs) =
      ElementwiseFunction<Elementwise>::apply(input, target, weight, pos_weight, options, training.upcast, &outputs);
  return outputs;
}

}  // namespace fusedloss::ops
