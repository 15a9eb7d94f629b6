// A call of cross entropy as its kernels take it.

#pragma once

#include "checks.h"
#include "class_views.h"
#include "cross_entropy.h"
#include "launch.h"

namespace fusedloss::ops {

inline constexpr LossKernels<CrossEntropyArgs> kCrossEntropyKernels = [](const auto& losses) -> const auto& {
  return losses.cross_entropy;
};

// Everything that forward and backward tell the kernel alike, and the tensors that must outlive it. Of a shard's
// classes, weights has those of the shard.
struct CrossEntropyProblem {
  CrossEntropyArgs args;
  Tensor logits, target, weight, sample_weight, denominator;

  CrossEntropyProblem(const Tensor& logits_, const Tensor& target_, const CrossEntropyWeights& weights,
                      const CrossEntropyOptions& options, const std::optional<ClassShard>& shard = {},
                      const Tensor& grad_logits = {}, const Tensor& grad_target = {})
      : logits(addressable(logits_)), weight(weight_view(weights.weight, logits_.scalar_type(), args.weight)) {
    if (is_present(weights.sample_weight)) sample_weight = position_view(*weights.sample_weight, args.sample_weight);
    if (is_present(weights.denominator)) denominator = weights.denominator->reshape({}).to(at::kDouble);
    args.has_probabilities = has_probabilities(logits_, target_);
    if (args.has_probabilities) {
      target = addressable(target_);
    } else {
      target = position_view(target_, args.target.index);
      args.target.ignore_index = options.ignore_index.expect_int();
    }
    if (shard) {
      args.first_class = shard->first_class.expect_int();
      args.all_classes = shard->num_classes.expect_int();
    }
    fill_class_views(args.shape, {{logits, args.logits},
                                  {args.has_probabilities ? target : Tensor(), args.probabilities},
                                  {grad_logits, args.grad_logits},
                                  {grad_target, args.grad_probabilities}});
    static_cast<math::RowOptions&>(args) = options;
    if (!(options.label_smoothing > 0)) args.label_smoothing = 0;  // NaN and negative numbers too
  }
};

}  // namespace fusedloss::ops
