// What every rung of the ladder shares: the problem, where a gradient lies, and a program that times one step.
//
// A rung computes, for each row x of logits and its target class t,
//   loss = log(sum of exp(x_c)) - x_t      gradient_c = exp(x_c) / sum - [c = t]
// It takes finite float32 logits only, and reduces nothing: the ladder is about the time that one row takes.

#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

struct Problem {
  float* logits;               // (rows, classes)
  const std::int64_t* target;  // (rows,)
  float* loss;                 // (rows,)
  std::int64_t rows, classes;

  std::size_t bytes() const { return sizeof(float) * rows * classes; }
};

// As a framework's allocator gives it for a large tensor: pages that the kernel has yet to provide.
inline float* fresh_memory(const Problem& problem) { return static_cast<float*>(std::malloc(problem.bytes())); }

using CrossEntropy = void (*)(const Problem&, float* gradient);
using Memory = float* (*)(const Problem&);

inline int time_steps(float* (*step)(float*, const std::int64_t*, float*, std::int64_t, std::int64_t)) {
  const std::int64_t rows = 512, classes = 32000;
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(rows * classes), loss(rows);
  std::vector<std::int64_t> target(rows);
  double best = 1e9;
  for (int turn = 0; turn < 5; ++turn) {
    for (float& x : logits) x = normal(random);
    for (std::int64_t& t : target) t = random() % classes;
    const auto start = std::chrono::steady_clock::now();
    float* gradient = step(logits.data(), target.data(), loss.data(), rows, classes);
    if (gradient != logits.data()) std::free(gradient);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = seconds < best ? seconds : best;
  }
  std::printf("%lld x %lld: %.2f ms, %.2f ns a logit; first loss %.5f\n", (long long)rows, (long long)classes,
              best * 1e3, best * 1e9 / (rows * classes), loss[0]);
  return 0;
}

// Makes a rung a program, and its `step` something that run.py can call. The gradient is the caller's to free, unless
// it is the logits.
#define RUNG(cross_entropy, memory)                                                                 \
  extern "C" float* step(float* logits, const std::int64_t* target, float* loss, std::int64_t rows, \
                         std::int64_t classes) {                                                    \
    const CrossEntropy compute = cross_entropy;                                                     \
    const Memory where = memory;                                                                    \
    const Problem problem{logits, target, loss, rows, classes};                                     \
    float* gradient = where(problem);                                                               \
    compute(problem, gradient);                                                                     \
    return gradient;                                                                                \
  }                                                                                                 \
  int main() { return time_steps(step); }
