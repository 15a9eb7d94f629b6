// Cross entropy with its gradient.

#include <ATen/ops/zeros.h>

#include "autograd.h"
#include "class_views.h"

namespace fusedloss::ops {
namespace {

constexpr const char* kName = "cross_entropy";

struct CrossEntropyFunction : LossFunction<CrossEntropyFunction> {
  static variable_list evaluate(AutogradContext* ctx, const Tensor& logits, const Tensor& target, OptionalTensor weight,
                                const CrossEntropyOptions& options, bool return_lse, bool upcast,
                                CrossEntropy::Outputs* outputs) {
    *outputs = Operator<&CrossEntropy::forward>::call_below_autograd(logits, target, weight, options, return_lse,
                                                                     {.upcast = upcast, .statistics = true});
    const auto& [loss, lse, row_max, row_log_sum, divisor] = *outputs;
    if (has_hooks()) remember_version(ctx, logits);
    save(ctx, {logits, target, weight.value_or(Tensor()), row_max, row_log_sum, divisor}, options);
    ctx->set_materialize_grads(false);
    return return_lse ? variable_list{loss, lse} : variable_list{loss};
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    check_version(kName, ctx);
    const auto [logits, target, weight, row_max, row_log_sum, divisor] = saved_tensors<6>(ctx);
    const auto options = saved_options<CrossEntropyOptions>(ctx);
    Tensor grad_loss = grads[0];
    if (!grad_loss.defined()) {
      const bool reduced = options.reduction != Reduction::none;
      grad_loss = at::zeros_symint(reduced ? c10::SymIntArrayRef() : row_max.sym_sizes(), row_max.options());
    }
    return Operator<&CrossEntropy::backward>::call_in_backward(
        grad_loss, grads.size() > 1 ? to_optional(grads[1]) : std::nullopt, logits, target, to_optional(weight),
        row_max, row_log_sum, divisor, options, wanted);
  }
};

struct CrossEntropyWithGrad : LossFunction<CrossEntropyWithGrad> {
  static Tensor evaluate(AutogradContext* ctx, const Tensor& logits, const Tensor& target, OptionalTensor weight,
                         const CrossEntropyOptions& options, const TrainingOptions& training) {
    GradientInForward gradient(kName, logits, training, empty_like_logits, {{"target", target}, {"weight", weight}});
    Tensor loss = Operator<&CrossEntropy::with_grad>::call_below_autograd(
        logits, target, weight, training.grad_scale, options, training.upcast, gradient.grad(), gradient.scale());
    const auto [grad, scale] = gradient.to_save(ctx);
    save(ctx,
         {grad, scale, target, weight.value_or(Tensor()),
          gradient.overwrites() ? Tensor() : for_double_backward(ctx, logits)},
         options);
    return loss;
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    const auto [grad, scale, target, weight, input] = saved_tensors<5>(ctx);
    if (!at::GradMode::is_enabled()) {
      const bool ignores = !at::isFloatingType(target.scalar_type());
      return {GradientInForward::rescaled(kName, ctx, grad, scale, grads[0], ignores), Tensor()};
    }
    check_not_overwritten(kName, input);
    const Tensor logits = from_forward(kName, ctx, input);
    const auto options = saved_options<CrossEntropyOptions>(ctx);
    const auto [loss, lse, row_max, row_log_sum, divisor] = Operator<&CrossEntropy::forward>::call_below_autograd(
        logits, target, to_optional(weight), options, /*return_lse=*/false, {.upcast = true, .statistics = true});
    return Operator<&CrossEntropy::backward>::call(grads[0], std::nullopt, logits, target, to_optional(weight), row_max,
                                                   row_log_sum, divisor, options, wanted);
  }
};

}  // namespace

CrossEntropy::Outputs CrossEntropy::autograd(const Tensor& logits, const Tensor& target, OptionalTensor weight,
                                             const CrossEntropyOptions& options, bool return_lse,
                                             const TrainingOptions& training) {
  check_dense(kName, {{"input", logits}, {"target", target}, {"weight", weight}});
  check_no_grad(kName, "weight", weight);
  if (!wants_grad(logits) && !wants_grad(target)) {
    const bool statistics = training.statistics || is_compiling();
    return Operator<&CrossEntropy::forward>::call_below_autograd(logits, target, weight, options, return_lse,
                                                                 {.upcast = training.upcast, .statistics = statistics});
  }
  const bool possible =
      options.reduction != Reduction::none && !return_lse && wants_grad(logits) && !wants_grad(target);
  if (grad_in_forward(kName, training, possible, logits)) {
    return {CrossEntropyWithGrad::apply(logits, target, weight, options, training), Tensor(), Tensor(), Tensor(),
            Tensor()};
  }
  Outputs outputs;
  const auto differentiable =
      CrossEntropyFunction::apply(logits, target, weight, options, return_lse, training.upcast, &outputs);
  std::get<0>(outputs) = differentiable[0];
  if (return_lse) std::get<1>(outputs) = differentiable[1];
  return outputs;
}

}  // namespace fusedloss::ops
