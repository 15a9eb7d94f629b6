// Reductions in a fixed order: within a warp, a block, and over the blocks of a grid. No floating-point atomics: a
// result is bitwise the same from run to run.

#pragma once

#include <cstdint>

#include "../../math/reduction.h"
#include "packets.cuh"

namespace fusedloss::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Butterflies: every lane of a group of `width` ends with the same result, since what is combined commutes bitwise.
template <int kWidth = kWarp, class Value>
__device__ __forceinline__ Value warp_sum(Value value) {
#pragma unroll
  for (int lane = kWidth / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

// Over groups of `width` lanes, a power of two; every lane of the warp takes part.
template <class Value>
__device__ __forceinline__ Value group_sum(Value value, int width) {
  for (int lane = width / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

template <class Value>
__device__ __forceinline__ Value group_max(Value value, int width) {
  for (int lane = width / 2; lane > 0; lane /= 2) {
    value = math::max_ignoring_nan(__shfl_xor_sync(kAllLanes, value, lane), value);
  }
  return value;
}

// What one thread, block or grid adds to the reduced loss.
struct Sums {
  double loss = 0;
  double divisor = 0;

  __device__ __forceinline__ void add(const Sums& other) {
    loss += other.loss;
    divisor += other.divisor;
  }
};

__device__ __forceinline__ Sums warp_sum(Sums sums) { return {warp_sum(sums.loss), warp_sum(sums.divisor)}; }

// The sums of a whole block, which the first warp gets. All threads call this, and may call it again at once.
__device__ __forceinline__ Sums block_sum(Sums sums) {
  __shared__ Sums parts[kWarp];
  const int warps = (blockDim.x + kWarp - 1) / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  sums = warp_sum(sums);
  __syncthreads();
  if (lane == 0) parts[warp] = sums;
  __syncthreads();
  if (warp == 0) sums = warp_sum(lane < warps ? parts[lane] : Sums{});
  return sums;
}

// Adds `sums` of all threads and hands the result to all of them.
__device__ __forceinline__ Sums block_sum_for_all(Sums sums) {
  __shared__ Sums result;
  sums = block_sum(sums);
  if (threadIdx.x == 0) result = sums;
  __syncthreads();
  return result;
}

// --- Over the grid --------------------------------------------------------------------------------------------

// Where the blocks of a grid leave their sums. `tickets` are zero when the kernel starts.
struct GridSums {
  Sums* parts = nullptr;        // (units,)
  unsigned* tickets = nullptr;  // [0]: the units that have arrived
  std::int64_t units = 1;       // of work, each of which leaves one part; one unit needs neither
};

__device__ __forceinline__ void write_total(const Total& total, const Sums& sums) {
  const double divisor = total.denominator ? *total.denominator : sums.divisor;
  if (total.divisor) *total.divisor = divisor;
  if (total.loss) {
    const bool is_mean = total.reduction == Reduction::mean;
    store(total.loss, total.dtype, 0,
          total.denominator ? math::reduced_over(sums.loss, divisor) : math::reduced(is_mean, sums.loss, divisor));
  }
}

// Whether this block is the last of `count` to draw a ticket. What the blocks wrote before is visible to it then.
__device__ __forceinline__ bool is_last(unsigned* ticket, std::int64_t count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) + 1 == count;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// To be called by all threads of the block once it has finished the unit of work: the last unit's block adds up the
// parts of all, in order, and writes the total.
__device__ __forceinline__ void add_up(const GridSums& grid, const Total& total, std::int64_t unit, Sums sums) {
  if (!total.loss && !total.divisor) return;
  sums = block_sum(sums);
  if (grid.units > 1) {
    if (threadIdx.x == 0) grid.parts[unit] = sums;
    if (!is_last(grid.tickets, grid.units)) return;
    sums = {};
    for (std::int64_t i = threadIdx.x; i < grid.units; i += blockDim.x) sums.add(grid.parts[i]);
    sums = block_sum(sums);
  }
  if (threadIdx.x == 0) write_total(total, sums);
}

}  // namespace fusedloss::cuda
