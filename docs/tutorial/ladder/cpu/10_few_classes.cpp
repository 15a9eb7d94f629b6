// Rung 10: few classes. A row of 19 fills one vector and a bit; so the lanes of a vector are 64 rows instead, and a
// loop over classes runs outside. The rows are turned into columns on their way into the cache, and back.

#include <algorithm>
#include <bit>
#include <cmath>
#include <thread>

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

constexpr int kLanes = 64;

// Rows [begin, end).
WIDEST static void cross_entropy_rows(const Problem& p, float* gradient, std::int64_t begin, std::int64_t end) {
  std::vector<float> tile(p.classes * kLanes);
  for (std::int64_t row = begin; row < end; row += kLanes) {
    const int lanes = static_cast<int>(std::min<std::int64_t>(kLanes, end - row));
    const float* x = p.logits + row * p.classes;
    float* g = gradient + row * p.classes;
    float max[kLanes], sum[kLanes], target_logit[kLanes], factor[kLanes];
    for (int i = 0; i < lanes; ++i) {
      target_logit[i] = x[i * p.classes + p.target[row + i]];
      for (std::int64_t c = 0; c < p.classes; ++c) tile[c * kLanes + i] = x[i * p.classes + c];
    }
    std::fill_n(max, kLanes, -INFINITY);
    std::fill_n(sum, kLanes, 0.0f);
    for (std::int64_t c = 0; c < p.classes; ++c) {
      const float* column = &tile[c * kLanes];
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) max[i] = column[i] > max[i] ? column[i] : max[i];
    }
    for (std::int64_t c = 0; c < p.classes; ++c) {
      float* column = &tile[c * kLanes];
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        column[i] = exp_nonpositive(column[i] - max[i]);
        sum[i] += column[i];
      }
    }
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) factor[i] = 1 / sum[i];
    for (int i = 0; i < lanes; ++i) {
      for (std::int64_t c = 0; c < p.classes; ++c) g[i * p.classes + c] = tile[c * kLanes + i] * factor[i];
      g[i * p.classes + p.target[row + i]] -= 1;
      p.loss[row + i] = std::log(sum[i]) - (target_logit[i] - max[i]);
    }
  }
}

static float* in_place(const Problem& p) { return p.logits; }

static void cross_entropy(const Problem& p, float* gradient) {
  const std::int64_t count = std::max(1u, std::thread::hardware_concurrency());
  const auto share = [&](std::int64_t i) {
    cross_entropy_rows(p, gradient, p.rows * i / count, p.rows * (i + 1) / count);
  };
  std::vector<std::thread> threads;
  for (std::int64_t i = 1; i < count; ++i) threads.emplace_back(share, i);
  share(0);  // a caller that only waits leaves its core to whom the system puts there, or to nobody
  for (std::thread& thread : threads) thread.join();
}

RUNG(cross_entropy, in_place)
