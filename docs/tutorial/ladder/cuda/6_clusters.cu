// Rung 6: a cluster of blocks for a row, each of which keeps a slice of it and reads the others' sums from their shared
// memory. 4 bytes a logit read, 4 written, for rows as long as eight blocks hold: about 1.8 MB. Needs classes divisible
// by 4, and compute capability 9.0.

#include <cooperative_groups.h>

#include "rung.cuh"

constexpr int kInFlight = 4;
constexpr int kCluster = 8;

__device__ float largest_of(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }
__device__ float sum_of(float4 v, float max) {
  return (__expf(v.x - max) + __expf(v.y - max)) + (__expf(v.z - max) + __expf(v.w - max));
}

__global__ void __cluster_dims__(kCluster)
    cross_entropy(const float* logits, const std::int64_t* target, float* loss, float* gradient, std::int64_t classes) {
#if __CUDA_ARCH__ >= 900
  __shared__ Sums parts[kWarp];
  __shared__ Sums block_sums;
  extern __shared__ float4 kept[];  // the slice
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const std::int64_t row = blockIdx.x / kCluster, slice = (classes / 4 + kCluster - 1) / kCluster;
  const std::int64_t begin = cluster.block_rank() * slice;
  const float* x = logits + row * classes;
  const float4* packets = reinterpret_cast<const float4*>(x) + begin;
  float4* results = reinterpret_cast<float4*>(gradient + row * classes) + begin;
  const std::int64_t left = classes / 4 - begin, count = left < slice ? left : slice;  // 0 or less: an empty slice
  Sums sums;
  for (std::int64_t p = threadIdx.x; p < count; p += kInFlight * blockDim.x) {
    float4 v[kInFlight];
    Sums chunk;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t at = p + u * blockDim.x;
      v[u] = at < count ? packets[at] : float4{-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if (at < count) kept[at] = v[u];
      chunk.max = fmaxf(chunk.max, largest_of(v[u]));
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) chunk.sum += sum_of(v[u], chunk.max);
    sums.merge(chunk);
  }
  sums = merge_block(sums, parts);
  if (threadIdx.x == 0) block_sums = sums;
  cluster.sync();
  sums = {};
  for (int rank = 0; rank < kCluster; ++rank) sums.merge(*cluster.map_shared_rank(&block_sums, rank));
  cluster.sync();  // no block may leave while its sums are still read
  const std::int64_t t = target[row];
  for (std::int64_t p = threadIdx.x; p < count; p += blockDim.x) {
    const float4 v = kept[p];  // which this thread has written
    const std::int64_t c = 4 * (begin + p);
    results[p] = {gradient_of(v.x, sums, c == t), gradient_of(v.y, sums, c + 1 == t),
                  gradient_of(v.z, sums, c + 2 == t), gradient_of(v.w, sums, c + 3 == t)};
  }
  if (threadIdx.x == 0 && begin == 0) loss[row] = loss_of(x[t], sums);
#endif
}

extern "C" int step(const float* logits, const std::int64_t* target, float* loss, float* gradient, std::int64_t rows,
                    std::int64_t classes) {
  if (classes % 4 != 0) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>((classes / 4 + kCluster - 1) / kCluster * sizeof(float4));  // of a slice
  const cudaError_t refused = cudaFuncSetAttribute(cross_entropy, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (refused != cudaSuccess) return cudaGetLastError();  // which forgets it, or the next launch would report it
  cross_entropy<<<static_cast<unsigned>(rows * kCluster), 512, bytes>>>(logits, target, loss, gradient, classes);
  return cudaGetLastError();
}
