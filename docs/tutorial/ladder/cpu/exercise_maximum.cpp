// The solution of the exercise: rung 2, with the maximum in a function that calls nothing, so that it can stay in a
// register.

#include <cmath>

#include "rung.h"

[[gnu::noinline]] static float largest(const float* x, std::int64_t count) {
  float max = x[0];
  for (std::int64_t c = 1; c < count; ++c) max = x[c] > max ? x[c] : max;
  return max;
}

static void cross_entropy(const Problem& p, float* gradient) {
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const float* x = p.logits + row * p.classes;
    float* g = gradient + row * p.classes;
    float sum = 0;
    const float max = largest(x, p.classes);
    for (std::int64_t c = 0; c < p.classes; ++c) sum += std::exp(x[c] - max);
    for (std::int64_t c = 0; c < p.classes; ++c) g[c] = std::exp(x[c] - max) / sum;
    p.loss[row] = std::log(sum) - (x[p.target[row]] - max);
    g[p.target[row]] -= 1;
  }
}

RUNG(cross_entropy, fresh_memory)
