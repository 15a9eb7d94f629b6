// Rung 1: a thread for a row. The lanes of a warp read the same class of 32 rows, which lie far apart: each read
// of 4 bytes fetches a sector of 32. Three passes: 12 bytes a logit read, 4 written.

#include "rung.cuh"

__global__ void cross_entropy(const float* logits, const std::int64_t* target, float* loss, float* gradient,
                              std::int64_t rows, std::int64_t classes) {
  const std::int64_t row = blockIdx.x * std::int64_t(blockDim.x) + threadIdx.x;
  if (row >= rows) return;
  const float* x = logits + row * classes;
  const std::int64_t t = target[row];  // in the loop it would be read for each logit: `gradient` might overlap `target`
  Sums sums;
  for (std::int64_t c = 0; c < classes; ++c) sums.max = fmaxf(sums.max, x[c]);
  for (std::int64_t c = 0; c < classes; ++c) sums.sum += __expf(x[c] - sums.max);
  for (std::int64_t c = 0; c < classes; ++c) gradient[row * classes + c] = gradient_of(x[c], sums, c == t);
  loss[row] = loss_of(x[t], sums);
}

extern "C" int step(const float* logits, const std::int64_t* target, float* loss, float* gradient, std::int64_t rows,
                    std::int64_t classes) {
  const int threads = 128;
  const unsigned blocks = static_cast<unsigned>((rows + threads - 1) / threads);
  cross_entropy<<<blocks, threads>>>(logits, target, loss, gradient, rows, classes);
  return cudaGetLastError();
}
