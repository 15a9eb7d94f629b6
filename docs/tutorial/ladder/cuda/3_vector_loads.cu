// Rung 3: a block for a row, and 16 bytes a load: a quarter of the load instructions, and four times the bytes in
// flight for each of them. Needs classes divisible by 4, so that every row starts at a multiple of 16 bytes.
// Three passes: 12 bytes a logit read, 4 written.

#include "rung.cuh"

__global__ void cross_entropy(const float* logits, const std::int64_t* target, float* loss, float* gradient,
                              std::int64_t classes) {
  __shared__ Sums parts[kWarp];
  const std::int64_t row = blockIdx.x;
  const float* x = logits + row * classes;
  const float4* packets = reinterpret_cast<const float4*>(x);
  float4* results = reinterpret_cast<float4*>(gradient + row * classes);
  const std::int64_t count = classes / 4;
  Sums sums;
  for (std::int64_t p = threadIdx.x; p < count; p += blockDim.x) {
    const float4 v = packets[p];
    sums.max = fmaxf(sums.max, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
  }
  for (std::int64_t p = threadIdx.x; p < count; p += blockDim.x) {
    const float4 v = packets[p];
    sums.sum += (__expf(v.x - sums.max) + __expf(v.y - sums.max)) + (__expf(v.z - sums.max) + __expf(v.w - sums.max));
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
