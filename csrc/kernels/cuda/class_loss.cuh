// What the losses over classes share on the device: a position's target, and where its entries lie.

#pragma once

#include "../class_loss.h"
#include "device_assert.cuh"
#include "packets.cuh"

namespace fusedloss::cuda {

// The types that a class index may have, and no others: a target is read at many places.
__device__ __forceinline__ std::int64_t index_at(const PositionTensor& tensor, std::int64_t position) {
  const std::int64_t at = position * tensor.stride;
  switch (tensor.dtype) {
    case Dtype::uint8: return static_cast<const std::uint8_t*>(tensor.data)[at];
    case Dtype::int32: return static_cast<const std::int32_t*>(tensor.data)[at];
    default: return static_cast<const std::int64_t*>(tensor.data)[at];
  }
}

// The class that an index stands for; an ignored one is no class, -1. Any other number that is no class stops the
// kernel before it is used. Whoever needs several indices loads them all before this judges the first: it waits for its
// own.
__device__ __forceinline__ int class_of(const ClassTarget& target, std::int64_t index, std::int64_t classes) {
  if (index == target.ignore_index) return -1;
  device_assert(index >= 0 && index < classes);
  return static_cast<int>(index);
}

// The divisor of a mean over class indices: the positions that count, or their weights. By a whole block.
template <class Acc>
__device__ __forceinline__ double count(const ClassTarget& target, const ClassShape& shape, const Acc* weight,
                                        std::int64_t begin, std::int64_t step) {
  double sum = 0;
  for (std::int64_t i = begin; i < shape.positions(); i += step) {
    const int index = class_of(target, index_at(target.index, i), shape.classes);
    if (index >= 0) sum += weight ? static_cast<double>(weight[index]) : 1;
  }
  return sum;
}

__host__ __device__ __forceinline__ std::int64_t offset_of(const ClassShape& shape, const ClassTensor& tensor,
                                                           std::int64_t position) {
  // A division for each short row would take as long as the row itself.
  if (shape.outer == 1) return position * tensor.inner_stride;
  const std::int64_t outer = position / shape.inner;
  return outer * tensor.outer_stride + (position - outer * shape.inner) * tensor.inner_stride;
}

}  // namespace fusedloss::cuda
