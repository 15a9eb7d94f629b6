// The operators, as functions over tensors: check, allocate, launch. One function serves every device; on the meta
// device (fake tensors, torch.compile, torch.export) it stops before the launch. Their schemas, with the same arguments
// in the same order, are in csrc/register.cpp, their options in csrc/ops/options.h.
//
// A loss is a struct of its operators, whose names begin with the loss's (kName where the schemas are made by it):
//
//   forward    NAME            the loss, and what backward needs
//   autograd                   forward under the Autograd key: with its gradient
//   with_grad  NAME_with_grad  forward and backward in one pass
//   backward   NAME_backward   the gradient
//
// with_grad returns the loss and writes the gradient, which may be the input, for a grad_output that it writes to
// `scale`: grad_scale, or where that would overflow or vanish in the gradient's type the nearest number that does not.
// Without `scale` it is 1, and nothing is expected.

#pragma once

#include <array>
#include <tuple>

#include "options.h"

namespace fusedloss::ops {

using LossAndDivisor = std::tuple<Tensor, Tensor>;
using TwoGrads = std::tuple<Tensor, Tensor>;  // each empty, of shape (0,), where its place in output_mask is false

struct CrossEntropy {
  using Weights = CrossEntropyWeights;
  // loss; lse, entropy, argmax; row_max, row_log_sum, row_gap, divisor
  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Outputs forward(const Tensor& logits, const Tensor& target, const Weights& weights,
                         const CrossEntropyOptions& options, const CrossEntropyAnswers& answers,
                         const TrainingOptions& training);
  static decltype(forward) autograd;
  static Tensor with_grad(const Tensor& logits, const Tensor& target, const Weights& weights, OptionalTensor grad_scale,
                          const CrossEntropyOptions& options, bool upcast, Tensor& grad_logits, OptionalTensor scale,
                          OptionalTensor argmax);
  static TwoGrads backward(const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy,
                           const Tensor& logits, const Tensor& target, const Weights& weights, const Tensor& row_max,
                           const Tensor& row_log_sum, OptionalTensor row_gap, const Tensor& divisor,
                           const CrossEntropyOptions& options, std::array<bool, 2> output_mask);
};

// Cross entropy of the classes of one rank, where a process group shares them (fusedloss/vocab_parallel.py). Targets
// and weights are those of all classes, probabilities those of the rank's own.
struct CrossEntropyFromShards {
  using Weights = CrossEntropyWeights;
  using Outputs = std::tuple<Tensor, Tensor, Tensor>;  // loss, lse, entropy

  // What the ranks exchange, (4 or more, positions...): the maximum, the logarithm of the sum, the loss and the mass of
  // each row's classes here; then, where they are wanted, the gap, and the largest logit and the bits of its class.
  static Tensor statistics(const Tensor& logits, const Tensor& target, const Weights& weights,
                           const CrossEntropyOptions& options, const ClassShard& shard,
                           const CrossEntropyAnswers& answers, bool upcast);
  // Copies of the merged results, which autograd takes for those of the logits.
  static Outputs forward(const Tensor& logits, const Tensor& target, const Weights& weights, const MergedRows& rows,
                         const CrossEntropyOptions& options, const ClassShard& shard, const Tensor& loss,
                         OptionalTensor lse, OptionalTensor entropy, const TrainingOptions& training);
  static decltype(forward) autograd;
  static void write_grad(const Tensor& logits, const Tensor& target, const Weights& weights, const MergedRows& rows,
                         const CrossEntropyOptions& options, const ClassShard& shard, OptionalTensor grad_scale,
                         Tensor& grad_logits, OptionalTensor scale);
  static TwoGrads backward(const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy,
                           const Tensor& logits, const Tensor& target, const Weights& weights, const MergedRows& rows,
                           const CrossEntropyOptions& options, const ClassShard& shard,
                           std::array<bool, 2> output_mask);
};

// Cross entropy of the logits input x linear_weight^T + linear_bias. input is (N, D), linear_weight (C, D) or
// (C, d1, ..., D). with_grad returns, beside the loss, either the gradient of the logits, which `gradients` makes those
// of input, weight and bias of, or these themselves, in the accumulate type.
struct LinearCrossEntropy {
  using Weights = CrossEntropyWeights;
  using Outputs = CrossEntropy::Outputs;
  // loss, argmax; grad_logits, rows, scale; grad_input, grad_linear_weight, grad_linear_bias: each empty where absent
  using WithGrad = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  using ThreeGrads = std::tuple<Tensor, Tensor, Tensor>;         // of input, linear_weight, linear_bias
  using FourGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of input, linear_weight, target, linear_bias

  static Outputs forward(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                         OptionalTensor linear_bias, const Weights& weights, const CrossEntropyOptions& options,
                         const CrossEntropyAnswers& answers, const LinearOptions& linear);
  static decltype(forward) autograd;
  static decltype(forward) autocast;
  static WithGrad with_grad(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            OptionalTensor linear_bias, const Weights& weights, const CrossEntropyOptions& options,
                            bool return_argmax, bool one_chunk, std::array<bool, 3> output_mask,
                            const LinearOptions& linear);
  static ThreeGrads gradients(const Tensor& grad_output, const Tensor& grad_logits, const Tensor& rows,
                              OptionalTensor scale, const Tensor& input, const Tensor& linear_weight,
                              const Tensor& target, c10::SymInt ignore_index, at::ScalarType weight_type,
                              std::array<bool, 3> output_mask, std::optional<at::ScalarType> input_type);
  static FourGrads backward(const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy,
                            const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            OptionalTensor linear_bias, const Weights& weights, const Tensor& row_max,
                            const Tensor& row_log_sum, OptionalTensor row_gap, const Tensor& divisor,
                            const CrossEntropyOptions& options, at::ScalarType weight_type,
                            std::array<bool, 4> output_mask, const LinearOptions& linear);
};

// The same of the classes of one rank, of which linear_weight holds the rows. Gradients of the input are a part of the
// sum over the ranks, in the accumulate type. With all logits at once, the others' operators do.
struct LinearCrossEntropyShard {
  using Weights = CrossEntropyWeights;

  static Tensor statistics(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                           OptionalTensor linear_bias, const Weights& weights, const CrossEntropyOptions& options,
                           const ClassShard& shard, const CrossEntropyAnswers& answers, const LinearOptions& linear);
  static LinearCrossEntropy::FourGrads backward(const Tensor& grad_loss, OptionalTensor grad_lse,
                                                OptionalTensor grad_entropy, const Tensor& input,
                                                const Tensor& linear_weight, const Tensor& target,
                                                OptionalTensor linear_bias, const Weights& weights,
                                                const MergedRows& rows, const CrossEntropyOptions& options,
                                                const ClassShard& shard, at::ScalarType weight_type,
                                                std::array<bool, 4> output_mask, const LinearOptions& linear);
};

struct Nll {
  using Options = First<2, CrossEntropyOptions>;  // reduction and ignore_index
  using Training = First<1, TrainingOptions>;     // upcast

  static LossAndDivisor forward(const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                                const Options& options, const Training& training);
  static decltype(forward) autograd;
  static Tensor backward(const Tensor& grad_loss, const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                         const Tensor& divisor, const Options& options);
};

// The losses of one element: which weights and training options they have. Elementwise<Bce> has the operators
// (csrc/ops/elementwise_op.h).
struct ElementwiseLoss;
template <class Loss>
struct Elementwise;

struct BceWithLogits {
  static constexpr const char* kName = "bce_with_logits";
  using Weights = ElementwiseWeights;
  using Training = First<4, TrainingOptions>;  // up to inplace
  static const ElementwiseLoss kLoss;
};

struct Bce {
  static constexpr const char* kName = "bce";
  using Weights = First<1, ElementwiseWeights>;
  using Training = First<3, TrainingOptions>;  // up to grad_scale
  static const ElementwiseLoss kLoss;
  static void check_autocast(const Tensor& input);
};

using AllLosses = std::tuple<CrossEntropy, CrossEntropyFromShards, LinearCrossEntropy, Nll, Elementwise<BceWithLogits>,
                             Elementwise<Bce>>;

// Calls a function with each loss.
template <class Call>
void for_each_loss(Call call) {
  std::apply([&](auto... loss) { (call(loss), ...); }, AllLosses());
}

// Multiplies a gradient that was written for a grad_output of `scale` (absent: 1) by grad_output / scale, in the
// accumulate type; does nothing where the two are equal. keep_zeros: what is 0 stays 0, also where inf or NaN flows
// back, as the gradients of ignored positions do.
void rescale_grad_(Tensor& grad, const Tensor& grad_output, OptionalTensor scale, bool keep_zeros);
Tensor rescale_grad(const Tensor& grad, const Tensor& grad_output, OptionalTensor scale, bool keep_zeros);

}  // namespace fusedloss::ops
