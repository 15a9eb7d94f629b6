// Which tensors share memory, by their strides: exact, where ATen answers "too hard" for most views and then allows it.

#pragma once

#include <ATen/core/Tensor.h>

namespace fusedloss::ops {

// Whether two elements of a tensor lie at one place.
bool overlaps_itself(const at::Tensor& tensor);

// Whether two tensors have a byte in common.
bool overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace fusedloss::ops
