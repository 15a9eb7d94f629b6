// Blocks that read one another's shared memory: what a cluster offers, on devices that have them (compute capability
// 9.0 and up). Code for other devices compiles, and is never launched.

#pragma once

#include <cooperative_groups.h>

namespace fusedloss::cuda {

// Whether the architecture that this code is compiled for has clusters.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;
#else
inline constexpr bool kHasClusters = false;
#endif

// Waits for all threads of the cluster; what they wrote before is visible after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

// A variable of shared memory, as the block of this rank in the cluster has it.
template <class Value>
__device__ __forceinline__ Value read_from_block(Value* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return *cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return *shared;
#endif
}

}  // namespace fusedloss::cuda
