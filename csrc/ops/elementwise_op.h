// The losses of one element. All that they share is here, and all but the name, the kernels and the options is shared.

#pragma once

#include "launch.h"
#include "losses.h"

namespace fusedloss::ops {

struct ElementwiseLoss {
  const char* name;
  LossKernels<ElementwiseArgs> kernels;
  // Input and target are probabilities: they must lie in [0, 1] and, as in native torch, have one type, and the
  // gradient knows no bound.
  bool probabilities;
};

struct ElementwiseInputs {
  Tensor input;
  Tensor target;
  Tensor weight;      // undefined: absent
  Tensor pos_weight;  // likewise
  ElementwiseOptions options;
};

LossAndDivisor elementwise_forward(const ElementwiseLoss& loss, ElementwiseInputs inputs, bool upcast);
Tensor elementwise_with_grad(const ElementwiseLoss& loss, ElementwiseInputs inputs, OptionalTensor grad_scale,
                             bool upcast, Tensor& grad_input, OptionalTensor scale);
TwoGrads elementwise_backward(const ElementwiseLoss& loss, ElementwiseInputs inputs, Tensor grad_loss,
                              const Tensor& divisor, std::array<bool, 2> output_mask);

// The operators. Each loss instantiates them in its own file, from csrc/ops/elementwise_autograd.h.
template <class Loss>
struct Elementwise : Loss {
  using typename Loss::Training;
  using typename Loss::Weights;

  static LossAndDivisor forward(const Tensor& input, const Tensor& target, const Weights& weights,
                                const ElementwiseOptions& options, const Training& training) {
    return elementwise_forward(Loss::kLoss, inputs(input, target, weights, options), training.upcast);
  }
  static LossAndDivisor autograd(const Tensor& input, const Tensor& target, const Weights& weights,
                                 const ElementwiseOptions& options, const Training& training);
  static Tensor with_grad(const Tensor& input, const Tensor& target, const Weights& weights, OptionalTensor grad_scale,
                          const ElementwiseOptions& options, bool upcast, Tensor& grad_input, OptionalTensor scale) {
    return elementwise_with_grad(Loss::kLoss, inputs(input, target, weights, options), grad_scale, upcast, grad_input,
                                 scale);
  }
  static TwoGrads backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Weights& weights,
                           const Tensor& divisor, const ElementwiseOptions& options, std::array<bool, 2> output_mask) {
    return elementwise_backward(Loss::kLoss, inputs(input, target, weights, options), grad_loss, divisor, output_mask);
  }

 private:
  static ElementwiseInputs inputs(const Tensor& input, const Tensor& target, const Weights& weights,
                                  const ElementwiseOptions& options) {
    return {input, target, weights.weight.value_or(Tensor()), weights.pos_weight.value_or(Tensor()), options};
  }
};

}  // namespace fusedloss::ops
