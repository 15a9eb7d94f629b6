// Arguments of the losses of one element: binary cross entropy, on logits or on probabilities.
//
// All tensors have the shape of `input`, whose dimensions the caller has sorted and merged as far as the strides of
// all of them allow; a stride of 0 broadcasts.

#pragma once

#include <array>
#include <cstdint>

#include "types.h"

namespace fusedloss {

inline constexpr int kMaxDims = 8;

struct ElementwiseShape {
  int dims = 0;
  std::int64_t numel = 1;
  std::array<std::int64_t, kMaxDims> sizes{};  // outermost first
};

struct ElementwiseTensor {
  void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::float32;
  bool linear = false;  // element i of the merged shape lies at i
  std::array<std::int64_t, kMaxDims> strides{};
};

struct ElementwiseArgs {
  ElementwiseShape shape;
  Dtype dtype = Dtype::float32;  // of input: decides the accumulate type
  ElementwiseTensor input;
  ElementwiseTensor target;
  ElementwiseTensor weight;
  ElementwiseTensor pos_weight;
  bool has_ignore_index = false;
  std::int64_t ignore_index = 0;

  // Forward
  ElementwiseTensor loss;  // absent when the loss is reduced
  Total total;

  // Backward, and forward with gradient, which has no grad_target and one grad_loss for all elements
  ElementwiseTensor grad_loss;           // the gradient of each loss; absent: ones
  const double* grad_divisor = nullptr;  // of the mean, which grad_loss is divided by; null: not divided
  ElementwiseTensor grad_input;          // may be the input itself
  ElementwiseTensor grad_target;
};

}  // namespace fusedloss
