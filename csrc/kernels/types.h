// The vocabulary that kernels and their callers share: element types, reductions, and partial results.
// Nothing here knows a framework.

#pragma once

#include <cstdint>

namespace fusedloss {

enum class Dtype : std::uint8_t { float32, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

// Integers, so that they can be an operator's argument. The values are native torch's.
enum class Reduction : std::int64_t { none = 0, mean = 1, sum = 2 };

// What one block of positions adds to the reduced loss. Blocks have a size that depends on the shape alone and are
// added in order, so a result is bitwise the same from run to run and for every number of threads.
struct Partial {
  double loss = 0;
  double divisor = 0;         // of the mean: positions or weights that count
  std::int64_t invalid = -1;  // the first position whose target cannot be read as a class, or whose value is refused
};

inline Partial reduce(const Partial* partials, std::int64_t count) {
  Partial total;
  for (std::int64_t i = 0; i < count; ++i) {
    total.loss += partials[i].loss;
    total.divisor += partials[i].divisor;
    if (total.invalid < 0) total.invalid = partials[i].invalid;
  }
  return total;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace fusedloss
