// Cross entropy with its gradient.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "autograd.h"
#include "class_views.h"

namespace fusedloss::ops {
namespace {

constexpr const char* kName = "cross_entropy";

CrossEntropyWeights weights_of(const Tensor& weight, const Tensor& sample_weight, const Tensor& denominator) {
  return {to_optional(weight), to_optional(sample_weight), to_optional(denominator)};
}

struct CrossEntropyFunction : LossFunction<CrossEntropyFunction> {
  static variable_list evaluate(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                                const CrossEntropyWeights& weights, const CrossEntropyOptions& options,
                                const CrossEntropyAnswers& answers, bool upcast, CrossEntropy::Outputs* outputs) {
    *outputs = Operator<&CrossEntropy::forward>::call_below_autograd(logits, target, weights, options, answers,
                                                                     {.upcast = upcast, .statistics = true});
    const auto& [loss, lse, entropy, argmax, row_max, row_log_sum, row_gap, divisor] = *outputs;
    if (has_hooks()) remember_version(ctx, logits);
    const auto given = [](OptionalTensor tensor) { return tensor.value_or(Tensor()); };
    save(ctx,
         {logits, target, given(weights.weight), given(weights.sample_weight), given(weights.denominator), row_max,
          row_log_sum, answers.entropy ? row_gap : Tensor(), divisor},
         options);
    ctx->saved_data["return_lse"] = answers.lse;
    ctx->set_materialize_grads(false);
    variable_list differentiable{loss};
    if (answers.lse) differentiable.push_back(lse);
    if (answers.entropy) differentiable.push_back(entropy);
    return differentiable;
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    check_version(kName, ctx);
    const auto [logits, target, weight, sample_weight, denominator, row_max, row_log_sum, row_gap, divisor] =
        saved_tensors<9>(ctx);
    const auto options = saved_options<CrossEntropyOptions>(ctx);
    Tensor grad_loss = grads[0];
    if (!grad_loss.defined()) {
      const bool reduced = options.reduction != Reduction::none;
      grad_loss = at::zeros_symint(reduced ? c10::SymIntArrayRef() : row_max.sym_sizes(), row_max.options());
    }
    const bool has_lse = ctx->saved_data["return_lse"].toBool();
    const auto grad_lse = has_lse ? to_optional(grads[1]) : std::nullopt;
    const auto grad_entropy = row_gap.defined() ? to_optional(grads[1 + has_lse]) : std::nullopt;
    return Operator<&CrossEntropy::backward>::call_in_backward(
        grad_loss, grad_lse, grad_entropy, logits, target, weights_of(weight, sample_weight, denominator), row_max,
        row_log_sum, to_optional(row_gap), divisor, options, wanted);
  }
};

struct CrossEntropyWithGrad : LossFunction<CrossEntropyWithGrad> {
  static Tensor evaluate(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                         const CrossEntropyWeights& weights, const CrossEntropyOptions& options,
                         const TrainingOptions& training, const std::optional<Tensor>& argmax) {
    GradientInForward gradient(kName, logits, training, empty_like_logits,
                               {{"target", target},
                                {"weight", weights.weight},
                                {"sample_weight", weights.sample_weight},
                                {"denominator", weights.denominator}});
    Tensor loss = Operator<&CrossEntropy::with_grad>::call_below_autograd(logits, target, weights, training.grad_scale,
                                                                          options, training.upcast, gradient.grad(),
                                                                          gradient.scale(), argmax);
    const auto [grad, scale] = gradient.to_save(ctx);
    const auto given = [](OptionalTensor tensor) { return tensor.value_or(Tensor()); };
    save(ctx,
         {grad, scale, target, given(weights.weight), given(weights.sample_weight), given(weights.denominator),
          gradient.overwrites() ? Tensor() : for_double_backward(ctx, logits, loss)},
         options);
    return loss;
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    const auto [grad, scale, target, weight, sample_weight, denominator, input] = saved_tensors<7>(ctx);
    if (!at::GradMode::is_enabled()) {
      const bool ignores = !at::isFloatingType(target.scalar_type());
      return {GradientInForward::rescaled(kName, ctx, grad, scale, grads[0], ignores), Tensor()};
    }
    check_not_overwritten(kName, input);
    const Tensor logits = from_forward(kName, ctx, input);
    const auto options = saved_options<CrossEntropyOptions>(ctx);
    const auto weights = weights_of(weight, sample_weight, denominator);
    const auto [loss, lse, entropy, argmax, row_max, row_log_sum, row_gap, divisor] =
        Operator<&CrossEntropy::forward>::call_below_autograd(logits, target, weights, options, {},
                                                              {.upcast = true, .statistics = true});
    return Operator<&CrossEntropy::backward>::call(grads[0], std::nullopt, std::nullopt, logits, target, weights,
                                                   row_max, row_log_sum, std::nullopt, divisor, options, wanted);
  }
};

}  // namespace

CrossEntropy::Outputs CrossEntropy::autograd(const Tensor& logits, const Tensor& target, const Weights& weights,
                                             const CrossEntropyOptions& options, const CrossEntropyAnswers& answers,
                                             const TrainingOptions& training) {
  check_dense(kName, {{"input", logits},
                      {"target", target},
                      {"weight", weights.weight},
                      {"sample_weight", weights.sample_weight},
                      {"denominator", weights.denominator}});
  check_no_grad(kName, "weight", weights.weight);
  check_no_grad(kName, "sample_weight", weights.sample_weight);
  check_no_grad(kName, "denominator", weights.denominator);
  if (!wants_grad(logits) && !wants_grad(target)) {
    const bool statistics = training.statistics || is_compiling();
    return Operator<&CrossEntropy::forward>::call_below_autograd(logits, target, weights, options, answers,
                                                                 {.upcast = training.upcast, .statistics = statistics});
  }
  Outputs outputs;
  const bool possible =
      options.reduction != Reduction::none && !answers.differentiable() && wants_grad(logits) && !wants_grad(target);
  if (grad_in_forward(kName, training, possible, logits)) {
    Tensor& argmax = std::get<3>(outputs);
    if (answers.argmax) argmax = at::empty_symint(position_sizes(logits), logits.options().dtype(at::kLong));
    std::get<0>(outputs) = CrossEntropyWithGrad::apply(logits, target, weights, options, training, to_optional(argmax));
    return outputs;
  }
  const auto differentiable =
      CrossEntropyFunction::apply(logits, target, weights, options, answers, training.upcast, &outputs);
  std::get<0>(outputs) = differentiable[0];
  if (answers.lse) std::get<1>(outputs) = differentiable[1];
  if (answers.entropy) std::get<2>(outputs) = differentiable.back();
  return outputs;
}

}  // namespace fusedloss::ops
