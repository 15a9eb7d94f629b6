// What the losses over classes share on the device: a position's target, and where its entries lie.

#pragma once

#include "../class_loss.h"
#include "device_assert.cuh"
#include "packets.cuh"

namespace fusedloss::cuda {

// The types that a class index may have, and no others: a target is read at many places.
template <class F>
__device__ __forceinline__ auto with_index(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::uint8: return body.template operator()<std::uint8_t>();
    case Dtype::int32: return body.template operator()<std::int32_t>();
    default: return body.template operator()<std::int64_t>();
  }
}

__device__ __forceinline__ std::int64_t index_at(const PositionTensor& tensor, std::int64_t position) {
  return with_index(tensor.dtype, [&]<class Index>() -> std::int64_t {
    return static_cast<const Index*>(tensor.data)[position * tensor.stride];
  });
}

// Those of neighbours, from a multiple of their number on.
template <int kCount>
__device__ __forceinline__ void load_indices(const PositionTensor& tensor, std::int64_t first,
                                             std::int64_t (&indices)[kCount]) {
  if (kCount % 2 == 0 && tensor.dtype == Dtype::int64 && tensor.stride == 1 && is_aligned(tensor.data)) {
    const auto* pairs = static_cast<const longlong2*>(tensor.data) + first / 2;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const longlong2 pair = pairs[i];
      indices[2 * i] = pair.x;
      indices[2 * i + 1] = pair.y;
    }
    return;
  }
  with_index(tensor.dtype, [&]<class Index>() {
    const Index* from = static_cast<const Index*>(tensor.data) + first * tensor.stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) indices[i] = from[i * tensor.stride];
  });
}

// The class that an index stands for; an ignored one is no class, -1. Any other number that is no class stops the
// kernel before it is used. Whoever needs several indices loads them all before this judges the first: it waits for its
// own.
__device__ __forceinline__ int class_of(const ClassTarget& target, std::int64_t index, std::int64_t classes) {
  if (index == target.ignore_index) return -1;
  device_assert(index >= 0 && index < classes);
  return static_cast<int>(index);
}

// The weight of a position; 1 where there are no weights.
template <class Acc>
__device__ __forceinline__ Acc weight_at(const PositionTensor& tensor, std::int64_t position) {
  return tensor.data ? load_floating<Acc>(tensor.data, tensor.dtype, position * tensor.stride) : Acc(1);
}

// The divisor of a mean over class indices: the positions that count, or their weights. By a whole block, each thread
// of which waits once for several indices.
template <class Acc>
__device__ __forceinline__ double count(const ClassTarget& target, const ClassShape& shape, const Acc* weight,
                                        std::int64_t begin, std::int64_t step) {
  constexpr int kAtOnce = 8;
  const std::int64_t positions = shape.positions();
  double sum = 0;
  for (; begin < positions; begin += kAtOnce * step) {
    std::int64_t indices[kAtOnce];
    with_index(target.index.dtype, [&]<class Index>() {
      const Index* from = static_cast<const Index*>(target.index.data);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const std::int64_t position = begin + i * step;
        indices[i] = position < positions ? from[position * target.index.stride] : target.ignore_index;
      }
    });
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = class_of(target, indices[i], shape.classes);
      if (index >= 0) sum += weight ? static_cast<double>(weight[index]) : 1;
    }
  }
  return sum;
}

// The same where positions have weights, with probabilities too.
template <class Acc>
__device__ __forceinline__ double count_weights(const CrossEntropyArgs& args, std::int64_t begin, std::int64_t step) {
  const Acc* const weight = static_cast<const Acc*>(args.weight);
  const std::int64_t positions = args.shape.positions();
  double sum = 0;
  for (; begin < positions; begin += step) {
    const double of_position = static_cast<double>(weight_at<Acc>(args.sample_weight, begin));
    if (args.has_probabilities) {
      sum += of_position;
      continue;
    }
    const int index = class_of(args.target, index_at(args.target.index, begin), args.shape.classes);
    if (index >= 0) sum += (weight ? static_cast<double>(weight[index]) : 1) * of_position;
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
