// Rung 9: each core takes its share of the rows. Rows do not meet, so the result is the same for any number.

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

constexpr std::int64_t kChunk = 1024;

// Rows [begin, end).
WIDEST static void cross_entropy_rows(const Problem& p, float* gradient, std::int64_t begin, std::int64_t end) {
  std::vector<float> chunk_max((p.classes + kChunk - 1) / kChunk);
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = p.logits + row * p.classes;
    const float target_logit = x[p.target[row]];  // before a gradient may take its place
    float* g = gradient + row * p.classes;
    float max = -INFINITY;
    double sum = 0;
    for (std::int64_t first = 0; first < p.classes; first += kChunk) {
      const std::int64_t last = std::min(first + kChunk, p.classes);
      float chunk = x[first], chunk_sum = 0;
#pragma omp simd reduction(max : chunk)
      for (std::int64_t c = first; c < last; ++c) chunk = x[c] > chunk ? x[c] : chunk;
#pragma omp simd reduction(+ : chunk_sum)
      for (std::int64_t c = first; c < last; ++c) {
        const float e = exp_nonpositive(x[c] - chunk);
        g[c] = e;
        chunk_sum += e;
      }
      const float larger = std::max(max, chunk);
      sum = sum * std::exp(max - larger) + double(chunk_sum) * std::exp(chunk - larger);
      max = larger;
      chunk_max[first / kChunk] = chunk;
    }
    for (std::int64_t first = 0; first < p.classes; first += kChunk) {
      const std::int64_t last = std::min(first + kChunk, p.classes);
      const float factor = float(std::exp(chunk_max[first / kChunk] - max) / sum);
#pragma omp simd
      for (std::int64_t c = first; c < last; ++c) g[c] *= factor;
    }
    p.loss[row] = float(std::log(sum)) - (target_logit - max);
    g[p.target[row]] -= 1;
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
