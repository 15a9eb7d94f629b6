// What the losses of one element share: checks, the merged shape, and the two operators over a pair of kernels.

#pragma once

#include <ATen/core/Tensor.h>

#include "launch.h"
#include "losses.h"

namespace fusedloss::ops {

struct ElementwiseLoss {
  const char* name;
  LossKernels<ElementwiseArgs> kernels;
  bool probabilities;  // input and target must lie in [0, 1] and, as in native torch, have one type
};

struct ElementwiseInputs {
  Tensor input;
  Tensor target;
  Tensor weight;      // undefined: absent; else it broadcasts to the input's shape
  Tensor pos_weight;  // likewise
  int64_t reduction;
  OptionalIndex ignore_index;
};

LossAndDivisor elementwise_forward(const ElementwiseLoss& loss, ElementwiseInputs inputs, bool upcast);
Tensor elementwise_with_grad(const ElementwiseLoss& loss, ElementwiseInputs inputs, OptionalTensor grad_scale,
                             bool upcast, Tensor& grad_input, OptionalTensor scale);
TwoGrads elementwise_backward(const ElementwiseLoss& loss, ElementwiseInputs inputs, Tensor grad_loss,
                              const Tensor& divisor, std::array<bool, 2> output_mask);

}  // namespace fusedloss::ops
