// Rung 11: an exponential of fewer instructions, and two of them at a time. x = n ln(2) / 8 + r: a table of the eight
// powers of 2 lies in a register, and r is so small that a cubic polynomial does.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "rung.h"

#if defined(__x86_64__)
#define WIDEST [[gnu::target_clones("arch=x86-64-v3", "default")]]
#else
#define WIDEST
#endif

typedef float Vector __attribute__((vector_size(32)));
typedef std::int32_t Bits __attribute__((vector_size(32)));

// The bits of 2^(k / 8), less those that k is going to add where n is shifted into the exponent.
static const Bits kTable = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                            0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

// exp(x) of two vectors for x <= 0: each step for both, since a chain of dependent instructions fills the processor's
// queue before it sees the next.
[[gnu::always_inline]] static inline void exp_nonpositive(Vector (&x)[2]) {
  constexpr float kRounder = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  Vector n[2], r[2], power[2], rest[2];
  for (int i = 0; i < 2; ++i) n[i] = x[i] * (8 * 1.44269504f) + kRounder;
  for (int i = 0; i < 2; ++i) r[i] = x[i] - (n[i] - kRounder) * (0.693147182f / 8);
  for (int i = 0; i < 2; ++i) {
    const Bits bits = (Bits)n[i];  // as they are
    power[i] = (Vector)(__builtin_shuffle(kTable, bits) + (bits << 20));
  }
  for (int i = 0; i < 2; ++i) rest[i] = r[i] * 0.166678396869694294f + 0.50005865180138854f;
  for (int i = 0; i < 2; ++i) rest[i] = rest[i] * r[i] + 1.0f;
  for (int i = 0; i < 2; ++i) rest[i] = rest[i] * (r[i] * power[i]) + power[i];
  for (int i = 0; i < 2; ++i) x[i] = x[i] < -87.33654f ? Vector{} : rest[i];
}

constexpr std::int64_t kChunk = 1024, kPair = 16;

// g = exp(x - max), and adds them.
[[gnu::always_inline]] static inline void exponentials(const float* x, float max, float* g, Vector (&sums)[2]) {
  Vector v[2];
  for (int i = 0; i < 2; ++i) std::memcpy(&v[i], x + 8 * i, sizeof(Vector));
  for (int i = 0; i < 2; ++i) v[i] -= max;
  exp_nonpositive(v);
  for (int i = 0; i < 2; ++i) sums[i] += v[i];
  for (int i = 0; i < 2; ++i) std::memcpy(g + 8 * i, &v[i], sizeof(Vector));
}

// Of a chunk: in pairs of vectors, and what is left over from a padded copy. Returns their sum.
[[gnu::always_inline]] static inline float exponentials(const float* x, float max, float* g, std::int64_t count) {
  Vector sums[2] = {};
  std::int64_t c = 0;
  for (; c + kPair <= count; c += kPair) exponentials(x + c, max, g + c, sums);
  if (c < count) {
    float padded[kPair];
    std::fill_n(std::copy(x + c, x + count, padded), kPair - (count - c), -INFINITY);
    exponentials(padded, max, padded, sums);
    std::copy_n(padded, count - c, g + c);
  }
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += sums[0][i] + sums[1][i];
  return sum;
}

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
      float chunk = x[first];
#pragma omp simd reduction(max : chunk)
      for (std::int64_t c = first; c < last; ++c) chunk = x[c] > chunk ? x[c] : chunk;
      const float chunk_sum = exponentials(x + first, chunk, g + first, last - first);
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
