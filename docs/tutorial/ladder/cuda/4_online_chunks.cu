// Rung 4: maximum and sum in one pass. A thread takes four packets at a time and rescales its sum once for all of them,
// rather than once for each logit. Two passes: 8 bytes a logit read, 4 written. Needs classes divisible by 4.

#include "rung.cuh"

constexpr int kInFlight = 4;

__device__ float largest_of(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }
__device__ float sum_of(float4 v, float max) {
  return (__expf(v.x - max) + __expf(v.y - max)) + (__expf(v.z - max) + __expf(v.w - max));
}

__global__ void cross_entropy(const float* logits, const std::int64_t* target, float* loss, float* gradient,
                              std::int64_t classes) {
  __shared__ Sums parts[kWarp];
  const std::int64_t row = blockIdx.x;
  const float* x = logits + row * classes;
  const float4* packets = reinterpret_cast<const float4*>(x);
  float4* results = reinterpret_cast<float4*>(gradient + row * classes);
  const std::int64_t count = classes / 4;
  Sums sums;
  for (std::int64_t p = threadIdx.x; p < count; p += kInFlight * blockDim.x) {
    float4 v[kInFlight];
    Sums chunk;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t at = p + u * blockDim.x;
      v[u] = at < count ? packets[at] : float4{-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      chunk.max = fmaxf(chunk.max, largest_of(v[u]));
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) chunk.sum += sum_of(v[u], chunk.max);
    sums.merge(chunk);
  }
  sums = merge_block(sums, parts);
  const std::int64_t t = target[row];
  for (std::int64_t p = threadIdx.x; p < count; p += blockDim.x) {
    const float4 v = packets[p];
    const std::int64_t c = 4 * p;
    results[p] = {gradient_of(v.x, sums, c == t), gradient_of(v.y, sums, c + 1 == t),
                  gradient_of(v.z, sums, c + 2 == t), gradient_of(v.w, sums, c + 3 == t)};
  }
  if (threadIdx.x == 0) loss[row] = loss_of(x[t], sums);
}

extern "C" int step(const float* logits, const std::int64_t* target, float* loss, float* gradient, std::int64_t rows,
                    std::int64_t classes) {
  if (classes % 4 != 0) return cudaErrorInvalidValue;
  cross_entropy<<<static_cast<unsigned>(rows), 512>>>(logits, target, loss, gradient, classes);
  return cudaGetLastError();
}
