// What a loss that makes its logits itself (csrc/ops/linear_cross_entropy.cpp) asks of cross entropy, beside its
// operators. Of `logits` these read shape, type and device; only gradients need what is in memory.

#pragma once

#include <optional>

#include "losses.h"

namespace fusedloss::ops {

// A target of the logits' own shape holds probabilities.
bool has_probabilities(const Tensor& logits, const Tensor& target);

// loss: whose name is in messages.
void check_cross_entropy(const char* loss, const Tensor& logits, const Tensor& target,
                         const CrossEntropyWeights& weights, const CrossEntropyOptions& options, bool upcast);

at::ScalarType cross_entropy_loss_type(const Tensor& logits, const Tensor& target, OptionalTensor weight, bool upcast);
// Of row_max, row_log_sum and row_gap.
at::ScalarType cross_entropy_statistics_type(const Tensor& logits, at::ScalarType loss_type);

// What the mean is divided by, as one float64: the weights of the positions that count, or the denominator.
Tensor mean_divisor(const Tensor& logits, const Tensor& target, const CrossEntropyWeights& weights,
                    const CrossEntropyOptions& options);

// No entry of the gradient is larger, for a grad_output of 1. There are logits.
Tensor largest_gradient(const Tensor& logits, const Tensor& target, const CrossEntropyWeights& weights,
                        const CrossEntropyOptions& options);

// The saved statistics of all positions, and what flows back into them.
struct CrossEntropyGradOutputs {
  Tensor loss;
  std::optional<Tensor> lse, entropy;
  Tensor row_max, row_log_sum;
  std::optional<Tensor> row_gap;
  Tensor divisor;
  std::optional<Tensor> row_mass;  // where the logits are of some of the classes alone
};

void check_cross_entropy_grads(const char* loss, const CrossEntropyGradOutputs& grads, const Tensor& logits,
                               const Tensor& target, const CrossEntropyWeights& weights,
                               const CrossEntropyOptions& options);

// Writes the gradients that are defined. That of the logits may take their place. shard: the classes that the logits
// are of, with their own class weights.
void write_cross_entropy_grads(const CrossEntropyGradOutputs& grads, const Tensor& logits, const Tensor& target,
                               const CrossEntropyWeights& weights, const CrossEntropyOptions& options,
                               Tensor& grad_logits, Tensor& grad_target, const std::optional<ClassShard>& shard = {});

}  // namespace fusedloss::ops
