// The vocabulary that kernels and their callers share: element types, reductions, and where their results go.
// Nothing here knows a framework.

#pragma once

#include <cstdint>

namespace fusedloss {

enum class Dtype : std::uint8_t { float32, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

// Integers, so that they can be an operator's argument. The values are native torch's.
enum class Reduction : std::int64_t { none = 0, mean = 1, sum = 2 };

// What a kernel is run for.
enum class Pass { forward, forward_with_gradient, backward };

// What a loss is reduced to. Where the results lie, on the device that the kernel runs on.
struct Total {
  Reduction reduction = Reduction::none;
  void* loss = nullptr;  // one element, of the sum or the mean; null: not wanted
  Dtype dtype = Dtype::float32;
  double* divisor = nullptr;  // one element, of the mean: positions or weights that count; null: not wanted
  // One element: what the mean is divided by instead, and what is written as its divisor; null: what has been counted.
  const double* denominator = nullptr;
};

// A tensor of shape (positions,), or one element for all positions (stride 0).
struct PositionTensor {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  std::int64_t stride = 1;
};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace fusedloss
