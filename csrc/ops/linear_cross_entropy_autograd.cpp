// A linear layer's cross entropy with its gradient: linear_plan.h says which of the two roads is taken.

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include "autograd.h"
#include "linear_cross_entropy.h"

namespace fusedloss::ops {
namespace {

CrossEntropyWeights weights_of(const Tensor& weight, const Tensor& sample_weight, const Tensor& denominator) {
  return {to_optional(weight), to_optional(sample_weight), to_optional(denominator)};
}

// The gradient from the statistics of the rows, which autograd may differentiate again.
template <class Call>
std::array<Tensor, 4> recomputed(Call call, AutogradContext* ctx, const Tensor& grad_loss, OptionalTensor grad_lse,
                                 OptionalTensor grad_entropy, const std::array<Tensor, 4>& inputs,
                                 const CrossEntropyWeights& weights, const CrossEntropy::Outputs& outputs,
                                 const std::array<bool, 4>& wanted) {
  const auto& [input, linear_weight, target, linear_bias] = inputs;
  const auto linear = saved_options<LinearOptions>(ctx);
  const auto cast = [&](const Tensor& tensor) { return cast_to(to_optional(tensor), linear.product_type); };
  const auto& [loss, lse, entropy, argmax, row_max, row_log_sum, row_gap, divisor] = outputs;
  auto [grad_input, grad_weight, grad_target, grad_bias] =
      call(grad_loss, grad_lse, grad_entropy, *cast(input), *cast(linear_weight), target, cast(linear_bias), weights,
           row_max, row_log_sum, to_optional(row_gap), divisor, saved_options<CrossEntropyOptions>(ctx),
           linear_weight.scalar_type(), wanted, linear);
  return {grad_input, grad_weight, grad_target, grad_bias};
}

// Of input, linear_weight, target and linear_bias, the last of which may be absent.
template <class Derived>
struct LinearFunction : LossFunction<Derived> {
  static constexpr std::size_t kDifferentiable = 4;
  static std::size_t differentiable(AutogradContext* ctx) { return ctx->saved_data["has_bias"].toBool() ? 4 : 3; }
};

struct LinearCrossEntropyFunction : LinearFunction<LinearCrossEntropyFunction> {
  static variable_list evaluate(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                                const Tensor& target, OptionalTensor linear_bias, const CrossEntropyWeights& weights,
                                const CrossEntropyOptions& options, const CrossEntropyAnswers& answers,
                                const LinearOptions& linear, CrossEntropy::Outputs* outputs) {
    LinearOptions with_statistics = linear;
    with_statistics.statistics = true;
    *outputs = Operator<&LinearCrossEntropy::forward>::call_below_autograd(input, linear_weight, target, linear_bias,
                                                                           weights, options, answers, with_statistics);
    const auto& [loss, lse, entropy, argmax, row_max, row_log_sum, row_gap, divisor] = *outputs;
    if (has_hooks()) {
      remember_version(ctx, input);
      remember_version(ctx, linear_weight, "linear_weight");
    }
    const auto given = [](OptionalTensor tensor) { return tensor.value_or(Tensor()); };
    save(ctx,
         {input, linear_weight, target, given(linear_bias), given(weights.weight), given(weights.sample_weight),
          given(weights.denominator), row_max, row_log_sum, answers.entropy ? row_gap : Tensor(), divisor},
         options, linear);
    ctx->saved_data["has_bias"] = is_present(linear_bias);
    ctx->saved_data["return_lse"] = answers.lse;
    ctx->set_materialize_grads(false);
    variable_list differentiable{loss};
    if (answers.lse) differentiable.push_back(lse);
    if (answers.entropy) differentiable.push_back(entropy);
    return differentiable;
  }

  static std::array<Tensor, 4> gradients(AutogradContext* ctx, const variable_list& grads,
                                         const std::array<bool, 4>& wanted) {
    const auto [input, linear_weight, target, linear_bias, weight, sample_weight, denominator, row_max, row_log_sum,
                row_gap, divisor] = saved_tensors<11>(ctx);
    check_version(kLinearName, ctx);
    check_version(kLinearName, ctx, "linear_weight");
    Tensor grad_loss = grads[0];
    if (!grad_loss.defined()) {
      const bool reduced = saved_options<CrossEntropyOptions>(ctx).reduction != Reduction::none;
      grad_loss = at::zeros_symint(reduced ? c10::SymIntArrayRef() : row_max.sym_sizes(), row_max.options());
    }
    const bool has_lse = ctx->saved_data["return_lse"].toBool();
    const auto grad_lse = has_lse ? to_optional(grads[1]) : std::nullopt;
    const auto grad_entropy = row_gap.defined() ? to_optional(grads[1 + has_lse]) : std::nullopt;
    return recomputed(Operator<&LinearCrossEntropy::backward>::call_in_backward, ctx, grad_loss, grad_lse, grad_entropy,
                      {input, linear_weight, target, linear_bias}, weights_of(weight, sample_weight, denominator),
                      {{}, {}, {}, {}, row_max, row_log_sum, row_gap, divisor}, wanted);
  }
};

struct LinearCrossEntropyWithGrad : LinearFunction<LinearCrossEntropyWithGrad> {
  static Tensor evaluate(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                         OptionalTensor linear_bias, const CrossEntropyWeights& weights,
                         const CrossEntropyOptions& options, const LinearOptions& linear, bool one_chunk,
                         const std::array<bool, 3>& wanted, Tensor* argmax) {
    const bool return_argmax = argmax->defined();
    const Tensor weight = cast_to(linear_weight, linear.product_type);
    const auto [loss, found_argmax, grad_logits, rows, scale, grad_input, grad_weight, grad_bias] =
        Operator<&LinearCrossEntropy::with_grad>::call_below_autograd(
            input, weight, target, cast_to(linear_bias, linear.product_type), weights, options, return_argmax,
            one_chunk, wanted, linear);
    *argmax = found_argmax;
    const auto given = [](OptionalTensor tensor) { return tensor.value_or(Tensor()); };
    save(ctx,
         {input, linear_weight, target, given(linear_bias), given(weights.weight), given(weights.sample_weight),
          given(weights.denominator), one_chunk ? weight : Tensor(), grad_logits, rows, scale, grad_input, grad_weight,
          grad_bias},
         options, linear);
    ctx->saved_data["has_bias"] = is_present(linear_bias);
    ctx->saved_data["one_chunk"] = one_chunk;
    if (has_hooks()) ctx->saved_data["hooks"] = true;
    return loss;
  }

  static std::array<Tensor, 4> gradients(AutogradContext* ctx, const variable_list& grads,
                                         const std::array<bool, 4>& wanted) {
    const auto [input, linear_weight, target, linear_bias, weight, sample_weight, denominator, cast_weight, grad_logits,
                rows, scale, grad_input, grad_weight, grad_bias] = saved_tensors<14>(ctx);
    const auto options = saved_options<CrossEntropyOptions>(ctx);
    if (at::GradMode::is_enabled()) {
      const NoAutocast no_autocast(c10::autocast_dispatch_keyset);  // the types are forward's
      auto linear = saved_options<LinearOptions>(ctx);
      linear.statistics = true;
      const auto weights = weights_of(weight, sample_weight, denominator);
      auto outputs = Operator<&LinearCrossEntropy::forward>::call_below_autograd(
          input, linear_weight, target, to_optional(linear_bias), weights, options, {}, linear);
      std::get<6>(outputs) = Tensor();  // an empty row_gap, which stands for none
      return recomputed(Operator<&LinearCrossEntropy::backward>::call, ctx, grads[0], std::nullopt, std::nullopt,
                        {input, linear_weight, target, linear_bias}, weights, outputs, wanted);
    }
    if (ctx->saved_data["one_chunk"].toBool()) {
      const auto has_scale = grad_logits.scalar_type() == at::kHalf ? to_optional(scale) : std::nullopt;
      auto [of_input, of_weight, of_bias] = Operator<&LinearCrossEntropy::gradients>::call_below_autograd(
          grads[0], grad_logits, rows, has_scale, input, cast_weight, target, options.ignore_index,
          linear_weight.scalar_type(), {wanted[0], wanted[1], wanted[3]}, std::nullopt);
      return {of_input, of_weight, Tensor(), of_bias};
    }
    // What has been added up is as wide as sums are, and rounded once it has its factor.
    const auto finished = [&](std::size_t i, const Tensor& sum, const Tensor& of) {
      if (!wanted[i]) return Tensor();
      const bool wraps = at::isTensorSubclassLike(grads[0]);
      if (i == 1 && sum.scalar_type() != of.scalar_type() && !wraps) {  // the large one, in one pass
        Tensor result = at::empty_like(sum, sum.options().dtype(of.scalar_type()));
        return at::mul_out(result, sum, grads[0].to(sum.scalar_type()));
      }
      return GradientInForward::rescaled(kLinearName, ctx, sum, {}, grads[0], true).to(of.scalar_type());
    };
    return {finished(0, grad_input, input), finished(1, grad_weight, linear_weight), Tensor(),
            finished(3, grad_bias, linear_bias)};
  }
};

}  // namespace

CrossEntropy::Outputs LinearCrossEntropy::autograd(const Tensor& input, const Tensor& linear_weight,
                                                   const Tensor& target, OptionalTensor linear_bias,
                                                   const Weights& weights, const CrossEntropyOptions& options,
                                                   const CrossEntropyAnswers& answers, const LinearOptions& linear) {
  check_dense(kLinearName, {{"input", input},
                            {"linear_weight", linear_weight},
                            {"target", target},
                            {"linear_bias", linear_bias},
                            {"weight", weights.weight},
                            {"sample_weight", weights.sample_weight},
                            {"denominator", weights.denominator}});
  check_no_grad(kLinearName, "weight", weights.weight);
  check_no_grad(kLinearName, "sample_weight", weights.sample_weight);
  check_no_grad(kLinearName, "denominator", weights.denominator);
  const std::array wanted{wants_grad(input), wants_grad(linear_weight),
                          is_present(linear_bias) && wants_grad(*linear_bias)};
  const bool of_target = wants_grad(target);
  if (!wanted[0] && !wanted[1] && !wanted[2] && !of_target) {
    LinearOptions forward = linear;
    forward.statistics = linear.statistics || is_compiling();
    return Operator<&LinearCrossEntropy::forward>::call_below_autograd(input, linear_weight, target, linear_bias,
                                                                       weights, options, answers, forward);
  }
  check_linear_shapes(input, linear_weight, linear_bias);
  const bool known = options.reduction != Reduction::none && !answers.differentiable() && !of_target &&
                     linear.grad_in_forward.value_or(!has_hooks());
  const LinearPlan plan = linear_plan(
      linear_problem<c10::SymInt>(input, linear_weight, linear, known, wanted[1]),
      [](const c10::SymInt& a, const c10::SymInt& b) { return a.sym_le(b).guard_or_false(__FILE__, __LINE__); });
  Outputs outputs;
  if (plan != LinearPlan::recomputed) {
    LinearOptions forward = linear;
    // A compiler is to know the shape of the logits that are kept.
    if (is_compiling() && plan == LinearPlan::one_chunk) forward.skip_ignored = false;
    Tensor argmax = answers.argmax ? at::empty({0}, input.options().dtype(at::kLong)) : Tensor();
    std::get<0>(outputs) =
        LinearCrossEntropyWithGrad::apply(input, linear_weight, target, linear_bias, weights, options, forward,
                                          plan == LinearPlan::one_chunk, wanted, &argmax);
    if (answers.argmax) std::get<3>(outputs) = argmax;
    return outputs;
  }
  const auto differentiable = LinearCrossEntropyFunction::apply(input, linear_weight, target, linear_bias, weights,
                                                                options, answers, linear, &outputs);
  std::get<0>(outputs) = differentiable[0];
  if (answers.lse) std::get<1>(outputs) = differentiable[1];
  if (answers.entropy) std::get<2>(outputs) = differentiable.back();
  return outputs;
}

}  // namespace fusedloss::ops
