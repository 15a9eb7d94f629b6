// Cross entropy of the classes of one rank, where a process group shares them. Each rank takes the statistics of its
// rows over its own classes; fusedloss/vocab_parallel.py gathers and merges them; and from the merged ones each rank
// has the gradient of its logits. Nothing here knows of other ranks.

#include "cross_entropy_shard.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "autograd.h"
#include "cross_entropy_problem.h"
#include "huge_pages.h"

namespace fusedloss::ops {
namespace {

constexpr const char* kName = "cross_entropy";

Tensor given(OptionalTensor tensor) { return tensor.value_or(Tensor()); }

struct FromShardsFunction : LossFunction<FromShardsFunction> {
  static variable_list evaluate(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                                const CrossEntropyWeights& weights, const MergedRows& rows,
                                const CrossEntropyOptions& options, const ClassShard& shard, const Tensor& loss,
                                OptionalTensor lse, OptionalTensor entropy) {
    if (has_hooks()) remember_version(ctx, logits);
    save(ctx,
         {logits, target, given(weights.weight), given(weights.sample_weight), given(rows.row_max),
          given(rows.row_log_sum), given(rows.row_gap), given(rows.row_mass), given(rows.divisor)},
         options, shard);
    ctx->saved_data["return_lse"] = is_present(lse);
    ctx->saved_data["return_entropy"] = is_present(entropy);
    ctx->set_materialize_grads(false);
    variable_list differentiable{loss.clone()};
    if (is_present(lse)) differentiable.push_back(lse->clone());
    if (is_present(entropy)) differentiable.push_back(entropy->clone());
    return differentiable;
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    check_version(kName, ctx);
    const auto [logits, target, weight, sample_weight, row_max, row_log_sum, row_gap, row_mass, divisor] =
        saved_tensors<9>(ctx);
    const auto options = saved_options<CrossEntropyOptions>(ctx);
    Tensor grad_loss = grads[0];
    if (!grad_loss.defined()) {
      const bool reduced = options.reduction != Reduction::none;
      grad_loss = at::zeros_symint(reduced ? c10::SymIntArrayRef() : row_max.sym_sizes(), row_max.options());
    }
    const bool has_lse = ctx->saved_data["return_lse"].toBool();
    const auto grad_lse = has_lse ? to_optional(grads[1]) : std::nullopt;
    const bool has_entropy = ctx->saved_data["return_entropy"].toBool();
    const auto grad_entropy = has_entropy ? to_optional(grads[1 + has_lse]) : std::nullopt;
    return Operator<&CrossEntropyFromShards::backward>::call_in_backward(
        grad_loss, grad_lse, grad_entropy, logits, target, {to_optional(weight), to_optional(sample_weight), {}},
        {row_max, row_log_sum, to_optional(row_gap), row_mass, divisor}, options, saved_options<ClassShard>(ctx),
        wanted);
  }
};

struct FromShardsWithGrad : LossFunction<FromShardsWithGrad> {
  static Tensor evaluate(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                         const CrossEntropyWeights& weights, const MergedRows& rows, const CrossEntropyOptions& options,
                         const ClassShard& shard, const TrainingOptions& training, const Tensor& loss) {
    GradientInForward gradient(kName, logits, training, empty_like_logits,
                               {{"target", target},
                                {"weight", weights.weight},
                                {"sample_weight", weights.sample_weight},
                                {"denominator", weights.denominator}});
    Operator<&CrossEntropyFromShards::write_grad>::call_below_autograd(
        logits, target, weights, rows, options, shard, training.grad_scale, gradient.grad(), gradient.scale());
    const auto [grad, scale] = gradient.to_save(ctx);
    save(ctx,
         {grad, scale, target, given(weights.weight), given(weights.sample_weight), given(rows.row_max),
          given(rows.row_log_sum), given(rows.row_mass), given(rows.divisor),
          gradient.overwrites() ? Tensor() : for_double_backward(ctx, logits, loss)},
         options, shard);
    return loss.clone();
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    const auto [grad, scale, target, weight, sample_weight, row_max, row_log_sum, row_mass, divisor, input] =
        saved_tensors<10>(ctx);
    if (!at::GradMode::is_enabled()) {
      const bool ignores = !at::isFloatingType(target.scalar_type());
      return {GradientInForward::rescaled(kName, ctx, grad, scale, grads[0], ignores), Tensor()};
    }
    check_not_overwritten(kName, input);
    return Operator<&CrossEntropyFromShards::backward>::call(
        grads[0], std::nullopt, std::nullopt, from_forward(kName, ctx, input), target,
        {to_optional(weight), to_optional(sample_weight), {}}, {row_max, row_log_sum, {}, row_mass, divisor},
        saved_options<CrossEntropyOptions>(ctx), saved_options<ClassShard>(ctx), wanted);
  }
};

}  // namespace

std::optional<Tensor> weight_of_shard(const char* loss, OptionalTensor weight, const c10::SymInt& classes,
                                      const ClassShard& shard) {
  TORCH_CHECK(shard.num_classes <= std::numeric_limits<int32_t>::max(), loss,
              ": num_classes is more than 2^31 - 1: ", shard.num_classes);
  TORCH_CHECK_VALUE(shard.first_class >= 0 && shard.first_class + classes <= shard.num_classes, loss, ": the classes ",
                    shard.first_class, " to ", shard.first_class + classes, " are not among num_classes ",
                    shard.num_classes);
  if (!is_present(weight)) return std::nullopt;
  TORCH_CHECK(weight->dim() == 1 && weight->sym_size(0) == shard.num_classes, loss, ": weight must have the shape [",
              shard.num_classes, "], one element for each class of all ranks, got ", weight->sym_sizes());
  return weight->narrow_symint(0, shard.first_class, classes);
}

Tensor CrossEntropyFromShards::statistics(const Tensor& logits, const Tensor& target, const Weights& of_all,
                                          const CrossEntropyOptions& given_options, const ClassShard& shard,
                                          const CrossEntropyAnswers& answers, bool upcast) {
  const auto classes = logits.dim() > 0 ? logits.sym_size(class_dim(logits)) : c10::SymInt(0);
  CrossEntropyWeights weights = of_all;
  weights.weight = weight_of_shard(kName, of_all.weight, classes, shard);
  check_cross_entropy(kName, logits, target, weights, given_options, upcast);
  weights.sample_weight = weights.denominator = std::nullopt;  // these are of whole rows
  CrossEntropyOptions options = given_options;
  options.reduction = Reduction::none;
  options.z_loss = 0;
  const auto loss_type = cross_entropy_loss_type(logits, target, of_all.weight, /*upcast=*/true);
  const auto type = cross_entropy_statistics_type(logits, loss_type);
  const auto positions = position_sizes(logits);
  c10::SymDimVector sizes{4 + answers.entropy + 2 * answers.argmax};
  sizes.append(positions.begin(), positions.end());
  Tensor packed = at::empty_symint(sizes, logits.options().dtype(type));
  if (logits.is_meta()) return packed;

  const auto plane = [&](int64_t i) { return packed.select(0, i); };
  if (classes == 0) {
    if (!has_probabilities(logits, target)) {
      check_targets(kName, shard.num_classes.expect_int(), target, options.ignore_index.expect_int());
    }
    packed.zero_();
    plane(0).fill_(-std::numeric_limits<double>::infinity());
    if (answers.argmax) plane(4 + answers.entropy).fill_(-std::numeric_limits<double>::infinity());
    return packed;
  }
  CrossEntropyProblem problem(widened(logits, loss_type), target, weights, options, shard);
  CrossEntropyArgs& args = problem.args;
  args.every_row = answers.any();
  args.row_max = plane(0).data_ptr();
  args.row_log_sum = plane(1).data_ptr();
  set_results(args, plane(2), Tensor(), Reduction::none);
  args.row_mass = plane(3).data_ptr();
  Tensor entropy, argmax;
  if (answers.entropy) {
    entropy = at::empty_symint(positions, packed.options());
    args.entropy = entropy.data_ptr();
    args.row_gap = plane(4).data_ptr();
  }
  if (answers.argmax) {
    argmax = at::empty_symint(positions, logits.options().dtype(at::kLong));
    args.argmax = argmax.mutable_data_ptr<int64_t>();
  }
  check_in_bounds(kName, args.class_count(), target, run(kCrossEntropyKernels, Pass::forward, args, logits));
  if (answers.argmax) {
    const int64_t dim = class_dim(logits);
    plane(4 + answers.entropy).copy_(logits.gather(dim, argmax.unsqueeze(dim)).squeeze(dim));
    // Its bits: a class may be larger than the integers that a float has.
    const auto bits = type == at::kDouble ? at::kLong : at::kInt;
    plane(5 + answers.entropy).view(bits).copy_(argmax.add_(args.first_class));
  }
  return packed;
}

CrossEntropyFromShards::Outputs CrossEntropyFromShards::forward(const Tensor& logits, const Tensor& target,
                                                                const Weights& weights, const MergedRows& rows,
                                                                const CrossEntropyOptions& options,
                                                                const ClassShard& shard, const Tensor& loss,
                                                                OptionalTensor lse, OptionalTensor entropy,
                                                                const TrainingOptions&) {
  const auto copy = [](OptionalTensor tensor) { return is_present(tensor) ? tensor->clone() : Tensor(); };
  return {loss.clone(), copy(lse), copy(entropy)};
}

CrossEntropyFromShards::Outputs CrossEntropyFromShards::autograd(const Tensor& logits, const Tensor& target,
                                                                 const Weights& weights, const MergedRows& rows,
                                                                 const CrossEntropyOptions& options,
                                                                 const ClassShard& shard, const Tensor& loss,
                                                                 OptionalTensor lse, OptionalTensor entropy,
                                                                 const TrainingOptions& training) {
  check_dense(kName, {{"input", logits}, {"target", target}, {"weight", weights.weight}});
  check_no_grad(kName, "weight", weights.weight);
  check_no_grad(kName, "sample_weight", weights.sample_weight);
  check_no_grad(kName, "denominator", weights.denominator);
  if (!wants_grad(logits) && !wants_grad(target)) {
    return Operator<&CrossEntropyFromShards::forward>::call_below_autograd(logits, target, weights, rows, options,
                                                                           shard, loss, lse, entropy, training);
  }
  check_merged(kName, rows);
  const bool possible = options.reduction != Reduction::none && !is_present(lse) && !is_present(entropy) &&
                        wants_grad(logits) && !wants_grad(target);
  if (grad_in_forward(kName, training, possible, logits)) {
    return {FromShardsWithGrad::apply(logits, target, weights, rows, options, shard, training, loss), Tensor(),
            Tensor()};
  }
  const auto differentiable =
      FromShardsFunction::apply(logits, target, weights, rows, options, shard, loss, lse, entropy);
  return {differentiable[0], is_present(lse) ? differentiable[1] : Tensor(),
          is_present(entropy) ? differentiable.back() : Tensor()};
}

void CrossEntropyFromShards::write_grad(const Tensor& logits, const Tensor& target, const Weights& weights,
                                        const MergedRows& rows, const CrossEntropyOptions& options,
                                        const ClassShard& shard, OptionalTensor grad_scale, Tensor& grad_logits,
                                        OptionalTensor scale) {
  check_merged(kName, rows);
  check_with_grad(kName, logits, grad_logits, grad_scale, scale, options.reduction);
  if (logits.is_meta()) return;
  const auto type = cross_entropy_loss_type(logits, target, weights.weight, /*upcast=*/true);
  const auto numbers = logits.options().dtype(at::kDouble);
  const auto classes = logits.sym_size(class_dim(logits));
  if (is_present(scale)) {
    CrossEntropyWeights of_mean = weights;
    if (options.reduction == Reduction::mean) of_mean.denominator = rows.divisor;
    scale->copy_(chosen_scale(grad_scale, grad_logits, type,
                              [&] { return largest_gradient(logits, target, of_mean, options); }));
  }
  if (classes == 0) return;
  const CrossEntropyWeights of_shard{weight_of_shard(kName, weights.weight, classes, shard), weights.sample_weight, {}};
  const Tensor grad_loss = is_present(scale) ? *scale : at::ones({}, numbers);
  const auto grads = grads_of(grad_loss, {}, {}, rows);
  check_cross_entropy_grads(kName, grads, logits, target, of_shard, options);
  const Tensor wide = widened(logits, type);
  const bool same_type = wide.scalar_type() == grad_logits.scalar_type();
  Tensor grad = same_type ? addressable(grad_logits) : empty_like_logits(wide), none;
  write_cross_entropy_grads(grads, wide, target, of_shard, options, grad, none, shard);
  if (!grad.is_same(grad_logits)) grad_logits.copy_(grad);
}

TwoGrads CrossEntropyFromShards::backward(const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy,
                                          const Tensor& logits, const Tensor& target, const Weights& weights,
                                          const MergedRows& rows, const CrossEntropyOptions& options,
                                          const ClassShard& shard, std::array<bool, 2> output_mask) {
  check_merged(kName, rows);
  const auto classes = logits.sym_size(class_dim(logits));
  const CrossEntropyWeights of_shard{weight_of_shard(kName, weights.weight, classes, shard), weights.sample_weight, {}};
  const auto grads = grads_of(grad_loss, grad_lse, grad_entropy, rows);
  check_cross_entropy_grads(kName, grads, logits, target, of_shard, options);
  TORCH_CHECK(!output_mask[1] || has_probabilities(logits, target), kName,
              ": a target of class indices has no gradient");
  const Tensor wide = widened(logits, cross_entropy_loss_type(logits, target, weights.weight, /*upcast=*/true));
  Tensor grad_logits = output_mask[0] ? with_huge_pages(empty_like_logits(wide)) : Tensor();
  Tensor grad_target = output_mask[1] ? with_huge_pages(empty_like_logits(target)) : Tensor();
  if (!logits.is_meta() && classes != 0) {
    write_cross_entropy_grads(grads, wide, target, of_shard, options, grad_logits, grad_target, shard);
  }
  const auto absent = [](const Tensor& like) { return at::empty({0}, like.options()); };
  return {output_mask[0] ? grad_logits.to(logits.scalar_type()) : absent(logits),
          output_mask[1] ? grad_target : absent(target)};
}

}  // namespace fusedloss::ops
