// Rung 5: the same code, compiled for AVX-512, AVX2 and SSE2. The loader takes the widest that the processor has.

#include <bit>
#include <cmath>

#include "rung.h"

#if defined(__x86_64__)
#define WIDEST [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define WIDEST
#endif

// exp(x) for x <= 0 without a branch, so that a loop over it vectorises: x = n ln 2 + r, and a polynomial for exp(r).
[[gnu::always_inline]] inline float exp_nonpositive(float x) {
  constexpr float kRounder = 12582912.0f + 127.0f;  // adding 1.5 * 2^23 rounds to an integer; 127 biases the exponent
  const float biased = x * 1.44269504f + kRounder, n = biased - kRounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 0.00139261835877134945f;
  series = series * r + 0.00836317905272257737f;
  series = series * r + 0.0416665546172045742f;
  series = series * r + 0.166665769896987757f;
  series = series * r + 0.5f;
  const float scale = std::bit_cast<float>(std::bit_cast<std::uint32_t>(biased) << 23);  // 2^n
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(((series * r + 1) * r + 1) * scale);
  // 0 where exp is denormal. A mask: before a conditional the compiler would branch around the arithmetic.
  return std::bit_cast<float>(bits & (std::uint32_t(x < -87.33654f) - 1));
}

WIDEST static void cross_entropy(const Problem& p, float* gradient) {
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const float* x = p.logits + row * p.classes;
    float* g = gradient + row * p.classes;
    float max = x[0], sum = 0;
#pragma omp simd reduction(max : max)
    for (std::int64_t c = 1; c < p.classes; ++c) max = x[c] > max ? x[c] : max;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < p.classes; ++c) {
      g[c] = exp_nonpositive(x[c] - max);
      sum += g[c];
    }
    const float factor = 1 / sum;
#pragma omp simd
    for (std::int64_t c = 0; c < p.classes; ++c) g[c] *= factor;
    p.loss[row] = std::log(sum) - (x[p.target[row]] - max);
    g[p.target[row]] -= 1;
  }
}

RUNG(cross_entropy, fresh_memory)
