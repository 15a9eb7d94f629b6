// What the entries of a row of logits add up to, as values that are merged: entries, lanes, warps, blocks.

#pragma once

#include "../../math/cross_entropy.h"
#include "reduce.cuh"

namespace fusedloss::cuda {

// What a row's entries add up to: the statistics of its softmax and, where every class has mass, its dense part, the
// sum of mass (max - x) over the entries, and their mass.
template <class Acc, bool kDense>
struct RowSums;

template <class Acc>
struct RowSums<Acc, false> : math::LogSumExp<Acc> {
  __device__ __forceinline__ void merge(const RowSums& other) { math::LogSumExp<Acc>::merge(other.max, other.sum); }
  __device__ __forceinline__ RowSums shuffled(int lane) const {
    RowSums other;
    other.max = __shfl_xor_sync(kAllLanes, this->max, lane);
    other.sum = __shfl_xor_sync(kAllLanes, this->sum, lane);
    return other;
  }
};

template <class Acc>
struct RowSums<Acc, true> : math::LogSumExp<Acc> {
  Acc dense_loss = Acc(0);
  double mass = 0;  // the gradient is p times this, minus masses that add up to it: what it rounds off stays

  __device__ __forceinline__ void merge(const RowSums& other) {
    const Acc mine = math::finite_shift(this->max), theirs = math::finite_shift(other.max);
    math::LogSumExp<Acc>::merge(other.max, other.sum);
    const Acc both = math::finite_shift(this->max);
    dense_loss = (dense_loss + math::entry_loss_at_max(mine - both, static_cast<Acc>(mass))) +
                 (other.dense_loss + math::entry_loss_at_max(theirs - both, static_cast<Acc>(other.mass)));
    mass += other.mass;
  }
  __device__ __forceinline__ RowSums shuffled(int lane) const {
    RowSums other;
    other.max = __shfl_xor_sync(kAllLanes, this->max, lane);
    other.sum = __shfl_xor_sync(kAllLanes, this->sum, lane);
    other.dense_loss = __shfl_xor_sync(kAllLanes, dense_loss, lane);
    other.mass = __shfl_xor_sync(kAllLanes, mass, lane);
    return other;
  }
};

template <class Row>
__device__ __forceinline__ void merge_lanes(Row& row, int width) {
  for (int lane = width / 2; lane > 0; lane /= 2) row.merge(row.shuffled(lane));
}

}  // namespace fusedloss::cuda
