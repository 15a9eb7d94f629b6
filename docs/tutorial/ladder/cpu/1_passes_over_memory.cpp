// Rung 1: each step of the formula is a pass over all logits, as if each were an operator of its own.

#include <cmath>

#include "rung.h"

static void cross_entropy(const Problem& p, float* gradient) {
  std::vector<float> max(p.rows), sum(p.rows);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const float* x = p.logits + row * p.classes;
    max[row] = x[0];
    for (std::int64_t c = 1; c < p.classes; ++c) max[row] = x[c] > max[row] ? x[c] : max[row];
  }
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const float* x = p.logits + row * p.classes;
    sum[row] = 0;
    for (std::int64_t c = 0; c < p.classes; ++c) sum[row] += std::exp(x[c] - max[row]);
    p.loss[row] = std::log(sum[row]) - (x[p.target[row]] - max[row]);
  }
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const float* x = p.logits + row * p.classes;
    float* g = gradient + row * p.classes;
    for (std::int64_t c = 0; c < p.classes; ++c) g[c] = std::exp(x[c] - max[row]) / sum[row];
    g[p.target[row]] -= 1;
  }
}

RUNG(cross_entropy, fresh_memory)
