// What every rung of the ladder shares: the sums of a row, and how lanes and warps merge theirs.
//
// A rung computes, for each row x of logits and its target class t,
//   loss = log(sum of exp(x_c)) - x_t      gradient_c = exp(x_c) / sum - [c = t]
// It takes finite float32 logits only, and reduces nothing.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A part of a row. A part of nothing has the maximum -inf, and merging it changes nothing.
struct Sums {
  float max = -INFINITY;
  float sum = 0;  // of exp(x - max)

  __device__ void merge(Sums other) {
    const float larger = fmaxf(max, other.max);
    if (larger == -INFINITY) return;  // both are empty, and -inf - -inf would be NaN
    sum = sum * __expf(max - larger) + other.sum * __expf(other.max - larger);
    max = larger;
  }
  __device__ void add(float x) { merge({x, 1}); }
};

// Every lane gets the sums of its warp.
__device__ inline Sums merge_warp(Sums sums) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sums.merge({__shfl_xor_sync(kAllLanes, sums.max, step), __shfl_xor_sync(kAllLanes, sums.sum, step)});
  }
  return sums;
}

// Every thread gets the sums of its block. `parts`: kWarp of them, in shared memory.
__device__ inline Sums merge_block(Sums sums, Sums* parts) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  sums = merge_warp(sums);
  if (lane == 0) parts[warp] = sums;
  __syncthreads();
  Sums part;
  if (lane < warps) part = parts[lane];
  __syncthreads();  // the next row may use `parts` again
  return merge_warp(part);
}

__device__ inline float gradient_of(float x, Sums row, bool is_target) {
  return __expf(x - row.max) / row.sum - (is_target ? 1.0f : 0.0f);
}

__device__ inline float loss_of(float target_logit, Sums row) { return logf(row.sum) - (target_logit - row.max); }
