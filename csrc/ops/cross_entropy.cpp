// Cross entropy over tensors. Which kernel arguments the checks and allocations below become is all there is here; the
// formulas are in csrc/math/cross_entropy.h and the loops in csrc/kernels.

#include "cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>

#include "cross_entropy_problem.h"
#include "huge_pages.h"

namespace fusedloss::ops {
namespace {

constexpr const char* kName = "cross_entropy";

void check_sample_weight(const char* loss, const Tensor& logits, OptionalTensor sample_weight) {
  if (!is_present(sample_weight)) return;
  check_floating(loss, "sample_weight", *sample_weight);
  const auto positions = position_sizes(logits);
  TORCH_CHECK_VALUE(sample_weight->sym_sizes() == c10::SymIntArrayRef(positions), loss,
                    ": sample_weight must have the shape ", c10::SymIntArrayRef(positions), " (input's shape ",
                    logits.sym_sizes(), " without the classes), got ", sample_weight->sym_sizes());
}

void check_denominator(const char* loss, OptionalTensor denominator, Reduction reduction) {
  if (!is_present(denominator)) return;
  TORCH_CHECK_VALUE(reduction == Reduction::mean, loss, ": denominator needs reduction 'mean', got ",
                    static_cast<int64_t>(reduction), reduction == Reduction::sum ? " (sum)" : " (none)");
  const auto type = denominator->scalar_type();
  TORCH_CHECK(denominator->sym_numel() == 1 && (is_supported_floating(type) || at::isIntegralType(type, false)), loss,
              ": denominator must be one real number, got ", type_and_shape(*denominator));
}

void check_argmax(const Tensor& logits, bool wanted) {
  TORCH_CHECK_INDEX(!wanted || logits.sym_size(class_dim(logits)) != 0, kName,
                    ": return_argmax needs classes, got input of shape ", logits.sym_sizes());
}

}  // namespace

bool has_probabilities(const Tensor& logits, const Tensor& target) {
  return target.dim() == logits.dim() && target.sym_sizes() == logits.sym_sizes();
}

void check_cross_entropy(const char* loss, const Tensor& logits, const Tensor& target,
                         const CrossEntropyWeights& weights, const CrossEntropyOptions& options, bool upcast) {
  const auto& weight = weights.weight;
  check_reduction(loss, options.reduction);
  check_devices(loss, {{"input", logits},
                       {"target", target},
                       {"weight", weight},
                       {"sample_weight", weights.sample_weight},
                       {"denominator", weights.denominator}});
  const bool probabilities = has_probabilities(logits, target);
  TORCH_CHECK(!probabilities || is_supported_floating(target.scalar_type()), loss,
              ": target has the input's shape and so must hold probabilities in a floating-point type, got ",
              type_and_shape(target));
  TORCH_CHECK_INDEX(logits.dim() > 0, loss, ": input must have a dimension of classes, got shape []");
  TORCH_CHECK(!probabilities || options.ignore_index < 0, loss,
              ": ignore_index is not supported for a target of probabilities, got ", options.ignore_index);
  check_floating(loss, "input", logits);
  if (!probabilities) {
    check_class_target(loss, logits, target);
    check_weight_type(loss, logits, weight, upcast);
  } else if (is_present(weight)) {
    check_weight(loss, "weight", *weight);
  }
  check_class_weight(loss, logits, weight, !probabilities);
  check_sample_weight(loss, logits, weights.sample_weight);
  check_denominator(loss, weights.denominator, options.reduction);
  TORCH_CHECK(!(options.label_smoothing > 1), loss, ": label_smoothing must be between 0 and 1, got ",
              options.label_smoothing);
  TORCH_CHECK_VALUE(std::isfinite(options.z_loss), loss, ": z_loss must be finite, got ", options.z_loss);
  TORCH_CHECK_VALUE(std::isfinite(options.logit_scale) && options.logit_scale > 0, loss,
                    ": logit_scale must be positive and finite, got ", options.logit_scale);
  TORCH_CHECK_VALUE(std::isfinite(options.logit_softcap) && options.logit_softcap >= 0, loss,
                    ": logit_softcap must be positive and finite, got ", options.logit_softcap);
  // Class indices are compared as 32-bit integers in the vector loops.
  TORCH_CHECK(logits.sym_size(class_dim(logits)) <= std::numeric_limits<int32_t>::max(), loss,
              ": input has more than 2^31 - 1 classes: ", logits.sym_sizes());
}

at::ScalarType cross_entropy_loss_type(const Tensor& logits, const Tensor& target, OptionalTensor weight, bool upcast) {
  auto type = upcast_type(logits.scalar_type(), upcast);
  if (!has_probabilities(logits, target)) return type;
  type = c10::promoteTypes(type, upcast_type(target.scalar_type(), upcast));
  return is_present(weight) ? c10::promoteTypes(type, upcast_type(weight->scalar_type(), upcast)) : type;
}

// lse and entropy have the type that the logits alone give them.
at::ScalarType cross_entropy_statistics_type(const Tensor& logits, at::ScalarType loss_type) {
  return loss_type == at::kDouble ? at::kDouble : accumulate_type(logits.scalar_type());
}

Tensor mean_divisor(const Tensor& logits, const Tensor& target, const CrossEntropyWeights& weights,
                    const CrossEntropyOptions& options) {
  if (is_present(weights.denominator)) return weights.denominator->reshape({}).to(at::kDouble);
  const auto positions = position_sizes(logits);
  Tensor counts = at::ones_symint(positions, logits.options().dtype(at::kDouble));
  if (is_present(weights.sample_weight)) counts = weights.sample_weight->to(at::kDouble);
  if (has_probabilities(logits, target)) return counts.sum();
  const Tensor indices = target.to(at::kLong);
  counts = at::where(indices.ne(options.ignore_index.expect_int()), counts, at::zeros_like(counts));
  if (!is_present(weights.weight)) return counts.sum();
  const Tensor weight = weights.weight->flatten().to(at::kDouble);
  const Tensor classes = indices.flatten().clamp(0, weight.numel() - 1);  // an ignored one may be outside
  return weight.index_select(0, classes).mul_(counts.flatten()).sum();
}

Tensor largest_gradient(const Tensor& logits, const Tensor& target, const CrossEntropyWeights& given,
                        const CrossEntropyOptions& options) {
  const auto& weight = given.weight;
  const bool indices = !has_probabilities(logits, target), mean = options.reduction == Reduction::mean;
  const Tensor weights = is_present(weight) ? weight->flatten().to(at::kDouble) : Tensor();
  // An entry is p A - a: masses may have both signs.
  Tensor largest = weights.defined() ? weights.abs().amax() * 2 : at::full({}, 2, logits.options().dtype(at::kDouble));
  // Smoothing adds the mass of one more distribution, at most.
  if (!indices) largest = largest * (target.to(at::kFloat).abs().sum(class_dim(logits)).amax() + 1);
  constexpr double kLargestLse = 0x1p16;
  largest = (largest + 2 * std::abs(options.z_loss) * kLargestLse) * options.logit_scale;
  Tensor sample_weights;
  if (is_present(given.sample_weight)) {
    sample_weights = given.sample_weight->flatten().to(at::kDouble);
    largest = largest * sample_weights.abs().amax();
  }
  if (!mean) return largest;
  return largest / mean_divisor(logits, target, given, options).abs();
}

void check_cross_entropy_grads(const char* loss, const CrossEntropyGradOutputs& grads, const Tensor& logits,
                               const Tensor& target, const CrossEntropyWeights& weights,
                               const CrossEntropyOptions& options) {
  const auto& [grad_loss, grad_lse, grad_entropy, row_max, row_log_sum, row_gap, divisor, row_mass] = grads;
  const bool upcast = true;  // forward has checked the types, under autocast or not
  check_cross_entropy(loss, logits, target, weights, options, upcast);
  const auto positions = position_sizes(logits);
  const auto type = cross_entropy_loss_type(logits, target, weights.weight, upcast);
  const auto statistics = cross_entropy_statistics_type(logits, type);
  check_grad_loss(loss, logits, grad_loss, divisor, options.reduction, positions);
  const bool has_entropy = is_present(grad_entropy);
  TORCH_CHECK(!has_entropy || is_present(row_gap), loss, ": grad_entropy needs row_gap");
  check_devices(loss, {{"input", logits},
                       {"grad_lse", grad_lse},
                       {"grad_entropy", grad_entropy},
                       {"row_max", row_max},
                       {"row_log_sum", row_log_sum},
                       {"row_gap", row_gap},
                       {"row_mass", row_mass}});
  const auto check_statistic = [&](const NamedTensor& statistic, at::ScalarType expected) {
    const auto& [name, tensor] = statistic;
    TORCH_CHECK(!tensor || (tensor->scalar_type() == expected && tensor->sym_sizes() == c10::SymIntArrayRef(positions)),
                loss, ": ", name, " must be ", expected, " of shape ", c10::SymIntArrayRef(positions), ", got ",
                type_and_shape(*tensor));
  };
  check_statistic({"row_max", row_max}, statistics);
  check_statistic({"row_log_sum", row_log_sum}, statistics);
  check_statistic({"row_gap", row_gap}, statistics);
  check_statistic({"row_mass", row_mass}, statistics);
  check_statistic({"grad_lse", grad_lse}, accumulate_type(logits.scalar_type()));
  check_statistic({"grad_entropy", grad_entropy}, accumulate_type(logits.scalar_type()));
}

void write_cross_entropy_grads(const CrossEntropyGradOutputs& grads, const Tensor& logits, const Tensor& target,
                               const CrossEntropyWeights& weights, const CrossEntropyOptions& options,
                               Tensor& grad_logits, Tensor& grad_target, const std::optional<ClassShard>& shard) {
  CrossEntropyProblem problem(logits, target, weights, options, shard, grad_logits, grad_target);
  CrossEntropyArgs& args = problem.args;
  const bool has_entropy = is_present(grads.entropy);
  const auto of_each = [&](const auto& tensor) {
    return is_present(tensor) ? tensor->to(grads.row_max.scalar_type()).contiguous() : Tensor();
  };
  const Tensor max = grads.row_max.contiguous(), sum = grads.row_log_sum.contiguous();
  const Tensor lse = of_each(grads.lse), entropy = of_each(grads.entropy);
  const Tensor mean_gap = has_entropy ? grads.row_gap->contiguous() : Tensor();
  const Tensor mass = of_each(grads.row_mass);
  args.row_max = max.data_ptr();
  args.row_log_sum = sum.data_ptr();
  args.row_gap = has_entropy ? mean_gap.data_ptr() : nullptr;
  args.row_mass = mass.defined() ? mass.data_ptr() : nullptr;
  args.grad_lse = lse.defined() ? lse.const_data_ptr() : nullptr;
  args.grad_entropy = entropy.defined() ? entropy.const_data_ptr() : nullptr;
  const Tensor flat_grad = position_view(grads.loss, args.grad_loss);
  args.grad_divisor = grad_divisor(grads.divisor, options.reduction);
  run(kCrossEntropyKernels, Pass::backward, args, logits);
}

CrossEntropy::Outputs CrossEntropy::forward(const Tensor& logits, const Tensor& target, const Weights& weights,
                                            const CrossEntropyOptions& options, const CrossEntropyAnswers& answers,
                                            const TrainingOptions& training) {
  check_cross_entropy(kName, logits, target, weights, options, training.upcast);
  check_argmax(logits, answers.argmax);

  const auto positions = position_sizes(logits);
  const auto type = cross_entropy_loss_type(logits, target, weights.weight, training.upcast);
  const auto statistics = logits.options().dtype(cross_entropy_statistics_type(logits, type));
  const auto loss_options = logits.options().dtype(type);
  const bool reduced = options.reduction != Reduction::none;
  Tensor loss = reduced ? at::empty({}, loss_options) : at::empty_symint(positions, loss_options);
  // What is not asked for is undefined, or empty for a compiler.
  const auto of_each = [&](bool wanted, const at::TensorOptions& type) {
    if (wanted) return at::empty_symint(positions, type);
    return training.statistics ? at::empty({0}, type) : Tensor();
  };
  Tensor lse = of_each(answers.lse, statistics), entropy = of_each(answers.entropy, statistics);
  Tensor argmax = of_each(answers.argmax, logits.options().dtype(at::kLong));
  Tensor row_max, row_log_sum, row_gap, divisor;
  if (training.statistics) {
    row_max = at::empty_symint(positions, statistics);
    row_log_sum = at::empty_symint(positions, statistics);
    row_gap = of_each(answers.entropy, statistics);
    divisor = at::empty({}, logits.options().dtype(at::kDouble));
  }

  if (!logits.is_meta()) {
    CrossEntropyProblem problem(widened(logits, type), target, weights, options);
    CrossEntropyArgs& args = problem.args;
    args.every_row = answers.any();
    if (training.statistics) {
      args.row_max = row_max.data_ptr();
      args.row_log_sum = row_log_sum.data_ptr();
      args.row_gap = answers.entropy ? row_gap.data_ptr() : nullptr;
    }
    args.lse = answers.lse ? lse.data_ptr() : nullptr;
    args.entropy = answers.entropy ? entropy.data_ptr() : nullptr;
    args.argmax = answers.argmax ? argmax.mutable_data_ptr<int64_t>() : nullptr;
    set_results(args, loss, divisor, options.reduction, problem.denominator);
    check_in_bounds(kName, logits.size(class_dim(logits)), target,
                    run(kCrossEntropyKernels, Pass::forward, args, logits));
    if (answers.entropy && args.shape.classes == 0) entropy.zero_();  // the sum of nothing, which no kernel forms
  }
  const auto returned = accumulate_type(logits.scalar_type());
  if (lse.defined()) lse = lse.to(returned);
  if (entropy.defined()) entropy = entropy.to(returned);
  return {loss, lse, entropy, argmax, row_max, row_log_sum, row_gap, divisor};
}

Tensor CrossEntropy::with_grad(const Tensor& logits, const Tensor& target, const Weights& weights,
                               OptionalTensor grad_scale, const CrossEntropyOptions& options, bool upcast,
                               Tensor& grad_logits, OptionalTensor scale, OptionalTensor argmax) {
  check_cross_entropy(kName, logits, target, weights, options, upcast);
  check_with_grad(kName, logits, grad_logits, grad_scale, scale, options.reduction);
  check_argmax(logits, is_present(argmax));
  if (is_present(argmax)) {
    const auto positions = position_sizes(logits);
    check_devices(kName, {{"input", logits}, {"argmax", argmax}});
    TORCH_CHECK(argmax->scalar_type() == at::kLong && argmax->sym_sizes() == c10::SymIntArrayRef(positions) &&
                    argmax->is_contiguous(),
                kName, ": argmax must be a contiguous int64 tensor of shape ", c10::SymIntArrayRef(positions), ", got ",
                type_and_shape(*argmax));
  }
  Tensor loss = at::empty({}, logits.options().dtype(cross_entropy_loss_type(logits, target, weights.weight, upcast)));

  if (!logits.is_meta()) {
    const Tensor wide = widened(logits, loss.scalar_type());
    const bool same_type = wide.scalar_type() == grad_logits.scalar_type();
    Tensor grad = same_type ? addressable(grad_logits) : empty_like_logits(wide);
    CrossEntropyProblem problem(wide, target, weights, options, {}, grad);
    CrossEntropyArgs& args = problem.args;
    if (is_present(argmax)) {
      args.every_row = true;
      args.argmax = argmax->mutable_data_ptr<int64_t>();
    }
    if (is_present(scale)) {
      scale->copy_(chosen_scale(grad_scale, grad_logits, loss.scalar_type(),
                                [&] { return largest_gradient(logits, target, weights, options); }));
      args.grad_loss = {scale->data_ptr(), Dtype::float64, 0};
    }
    set_results(args, loss, Tensor(), options.reduction, problem.denominator);
    check_in_bounds(kName, logits.size(class_dim(logits)), target,
                    run(kCrossEntropyKernels, Pass::forward_with_gradient, args, logits));
    if (!grad.is_same(grad_logits)) grad_logits.copy_(grad);
  }
  return loss;
}

TwoGrads CrossEntropy::backward(const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy,
                                const Tensor& logits, const Tensor& target, const Weights& weights,
                                const Tensor& row_max, const Tensor& row_log_sum, OptionalTensor row_gap,
                                const Tensor& divisor, const CrossEntropyOptions& options,
                                std::array<bool, 2> output_mask) {
  const CrossEntropyGradOutputs grads{grad_loss, grad_lse, grad_entropy, row_max, row_log_sum, row_gap, divisor, {}};
  check_cross_entropy_grads(kName, grads, logits, target, weights, options);
  const auto type = cross_entropy_loss_type(logits, target, weights.weight, /*upcast=*/true);
  TORCH_CHECK(!output_mask[1] || has_probabilities(logits, target), kName,
              ": a target of class indices has no gradient");

  const Tensor wide = widened(logits, type);
  Tensor grad_logits = output_mask[0] ? with_huge_pages(empty_like_logits(wide)) : Tensor();
  Tensor grad_target = output_mask[1] ? with_huge_pages(empty_like_logits(target)) : Tensor();
  if (!logits.is_meta()) {
    write_cross_entropy_grads(grads, wide, target, weights, options, grad_logits, grad_target);
  }
  const auto absent = [](const Tensor& like) { return at::empty({0}, like.options()); };
  return {output_mask[0] ? grad_logits.to(logits.scalar_type()) : absent(logits),
          output_mask[1] ? grad_target : absent(target)};
}

}  // namespace fusedloss::ops
