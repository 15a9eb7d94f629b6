// float32 by the vector, for the loops that a compiler does not vectorise well: a type that the formulas of csrc/math
// take for a number, and an exponential that looks up a table in a register. Float64, and sets that are switched on
// without it, have plain loops over numbers.
//
// The including file defines FUSEDLOSS_LANES, the float32 lanes of the set that it has switched on: 8 with AVX2, FMA
// and F16C, 16 with AVX-512. Where it has switched on none, there is no vector.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../../math/portable.h"

#if !defined(FUSEDLOSS_LANES)
#define FUSEDLOSS_LANES 4
#endif

#if FUSEDLOSS_LANES == 8 || FUSEDLOSS_LANES == 16
#define FUSEDLOSS_VECTORS 1
#include <immintrin.h>

// That a vector is returned otherwise where its set is not switched on concerns nobody: all of these are inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fusedloss::cpu {
namespace {

struct FloatVector {
  static constexpr int kLanes = FUSEDLOSS_LANES;
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
  typedef std::int32_t Bits __attribute__((vector_size(4 * kLanes)));

  Floats value;

  FloatVector() = default;
  FUSEDLOSS_FN FloatVector(Floats value) : value(value) {}
  FUSEDLOSS_FN explicit FloatVector(float x) : value(x - Floats{}) {}

  FUSEDLOSS_FN static FloatVector load(const float* from) {
    FloatVector loaded;
    std::memcpy(&loaded.value, from, sizeof(Floats));
    return loaded;
  }
  FUSEDLOSS_FN void store(float* to) const { std::memcpy(to, &value, sizeof(Floats)); }
  FUSEDLOSS_FN float sum() const {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += value[i];
    return total;
  }
  FUSEDLOSS_FN Bits bits() const { return std::bit_cast<Bits>(value); }

  FUSEDLOSS_FN friend FloatVector operator-(FloatVector a) { return -a.value; }
  FUSEDLOSS_FN friend FloatVector operator+(FloatVector a, FloatVector b) { return a.value + b.value; }
  FUSEDLOSS_FN friend FloatVector operator-(FloatVector a, FloatVector b) { return a.value - b.value; }
  FUSEDLOSS_FN friend FloatVector operator*(FloatVector a, FloatVector b) { return a.value * b.value; }
  FUSEDLOSS_FN friend FloatVector operator/(FloatVector a, FloatVector b) { return a.value / b.value; }
  FUSEDLOSS_FN friend Bits operator<(FloatVector a, FloatVector b) { return a.value < b.value; }
  FUSEDLOSS_FN friend Bits operator<=(FloatVector a, FloatVector b) { return a.value <= b.value; }
  FUSEDLOSS_FN friend Bits operator==(FloatVector a, FloatVector b) { return a.value == b.value; }
};

FUSEDLOSS_FN FloatVector select(FloatVector::Bits condition, FloatVector a, FloatVector b) {
  return condition ? a.value : b.value;
}
FUSEDLOSS_FN FloatVector zero_if(FloatVector::Bits condition, FloatVector x) {
  return std::bit_cast<FloatVector::Floats>(x.bits() & ~condition);
}
FUSEDLOSS_FN FloatVector zero_if(bool condition, FloatVector x) { return condition ? FloatVector(0) : x; }
FUSEDLOSS_FN FloatVector abs(FloatVector x) { return std::bit_cast<FloatVector::Floats>(x.bits() & 0x7fffffff); }

// What the two sets spell differently. a * b + c and c - a * b, rounded once; the larger number; the entries of a table
// of kLanes that the lowest bits name; float16.
#if FUSEDLOSS_LANES == 8
FUSEDLOSS_FN FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
  return {_mm256_fmadd_ps(a.value, b.value, c.value)};
}
FUSEDLOSS_FN FloatVector fused_negative(FloatVector a, FloatVector b, FloatVector c) {
  return {_mm256_fnmadd_ps(a.value, b.value, c.value)};
}
FUSEDLOSS_FN FloatVector max_ignoring_nan(FloatVector a, FloatVector b) { return {_mm256_max_ps(a.value, b.value)}; }
FUSEDLOSS_FN FloatVector::Bits entries(FloatVector::Bits table, FloatVector::Bits index) {
  return FloatVector::Bits(_mm256_permutevar8x32_epi32(__m256i(table), __m256i(index)));
}
FUSEDLOSS_FN FloatVector load_float16(const void* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)))};
}
FUSEDLOSS_FN void store_float16(FloatVector x, void* to) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT));
}
#else
FUSEDLOSS_FN FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
  return {_mm512_fmadd_ps(a.value, b.value, c.value)};
}
FUSEDLOSS_FN FloatVector fused_negative(FloatVector a, FloatVector b, FloatVector c) {
  return {_mm512_fnmadd_ps(a.value, b.value, c.value)};
}
FUSEDLOSS_FN FloatVector max_ignoring_nan(FloatVector a, FloatVector b) {
  return {_mm512_maskz_max_ps(__mmask16(-1), a.value, b.value)};
}
FUSEDLOSS_FN FloatVector::Bits entries(FloatVector::Bits table, FloatVector::Bits index) {
  return FloatVector::Bits(_mm512_maskz_permutexvar_epi32(__mmask16(-1), __m512i(index), __m512i(table)));
}
FUSEDLOSS_FN FloatVector load_float16(const void* from) {
  return {_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(static_cast<const __m256i*>(from)))};
}
FUSEDLOSS_FN void store_float16(FloatVector x, void* to) {
  const __m256i rounded = _mm512_maskz_cvtps_ph(__mmask16(-1), x.value, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(static_cast<__m256i*>(to), rounded);
}
#endif

// Calls body(0), body(1), ... body(kCount - 1), each with a constant: what is indexed by it stays in registers.
template <int kCount, class Body>
FUSEDLOSS_FN void unrolled(Body body) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      __attribute__((always_inline)) { (body(i), ...); }(std::make_integer_sequence<int, kCount>());
}

// x = n ln(2) / K + r with |r| <= ln(2) / (2 K), and n = K m + k. Then exp(x) = 2^(k / K) 2^m exp(r), where a table of
// the K factors leaves a cubic polynomial to do (P. Tang, "Table-driven implementation of the exponential function in
// IEEE floating-point arithmetic", ACM TOMS 15, 1989). K is as many as a vector has lanes.
struct ExpTable {
  // Of 2^(k / K) the bits, less those that k is going to add where n is moved to. What rounding leaves out is 3.2e-8
  // with 8 entries, 4.7e-8 with 16.
  alignas(64) static constexpr std::int32_t kBits[] = {
#if FUSEDLOSS_LANES == 8
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
#else
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d,
#endif
  };
  static constexpr int kEntries = FloatVector::kLanes;
  static constexpr int kShift = kEntries == 8 ? 20 : 19;
  // (exp(r) - 1) / r = 1 + quadratic r + cubic r^2 at Chebyshev nodes; exp(r) to 3.8e-8 with 8 entries, to 2.4e-9
  // with 16.
  static constexpr float kQuadratic = kEntries == 8 ? 0.50005865180138854f : 0.500014662434374272f;
  static constexpr float kCubic = kEntries == 8 ? 0.166678396869694294f : 0.166669599143713679f;
};

// exp(x) of several vectors, for x <= 0; as math::exp_nonpositive, results below the smallest normal number are 0. They
// take each step together: one after the other, a chain of dependent instructions fills the processor's queue before it
// sees the next chain. ln 2 is one constant, where the polynomial has two: what the second would add is a tenth of what
// the difference x of two logits has been rounded by.
template <int kVectors>
FUSEDLOSS_FN void exp_nonpositive_each(FloatVector (&x)[kVectors]) {
  using F = math::Format<float>;
  using V = FloatVector;
  using T = ExpTable;
  V n[kVectors], r[kVectors], power[kVectors], rest[kVectors];
  V::Bits table;
  std::memcpy(&table, T::kBits, sizeof(table));
  const auto each = [](auto step) __attribute__((always_inline)) { unrolled<kVectors>(step); };
  each([&](int i) { n[i] = fused(x[i], V(T::kEntries * F::log2_e), V(F::rounder)); });
  each([&](int i) { r[i] = fused_negative(n[i] - V(F::rounder), V(F::ln2 / T::kEntries), x[i]); });
  each([&](int i) { power[i] = std::bit_cast<V::Floats>(entries(table, n[i].bits()) + (n[i].bits() << T::kShift)); });
  each([&](int i) { rest[i] = fused(r[i], V(T::kCubic), V(T::kQuadratic)); });
  each([&](int i) { rest[i] = fused(rest[i], r[i], V(1)); });
  each([&](int i) { r[i] = r[i] * power[i]; });
  each([&](int i) { rest[i] = fused(rest[i], r[i], power[i]); });
  each([&](int i) { x[i] = zero_if(x[i] < V(F::exp_normal), rest[i]); });  // NaN is not below
}

FUSEDLOSS_FN FloatVector exp_nonpositive(FloatVector x) {
  FloatVector one[] = {x};
  exp_nonpositive_each(one);
  return one[0];
}

// As the function of numbers, without a division: (log(1 + f) - f + f^2 / 2) / f^3 at Chebyshev nodes, to 3.2e-9 of
// the result. For x in [0, 1/2]; of 0 it makes about -104, of NaN some number.
inline constexpr float kLogSeries[] = {0.333333311800300481f,  -0.24999996957950882f,  0.200007157488921017f,
                                       -0.166678023195012541f, 0.142490576456974804f,  -0.124256873314511061f,
                                       0.116854199234867393f,  -0.114797338466376356f, 0.0697161147145117783f};
FUSEDLOSS_FN FloatVector fast_log(FloatVector x) {
  using F = math::Format<float>;
  using V = FloatVector;
  const V::Bits denormal = x < V(std::numeric_limits<float>::min());
  const V::Bits bits = select(denormal, x * V(F::two_to_mantissa), x).bits() + (F::one - F::sqrt_half);
  const V::Bits exponent = (bits >> F::mantissa_bits) - F::bias - (denormal & F::mantissa_bits);
  const V f = std::bit_cast<V::Floats>((bits & ((1 << F::mantissa_bits) - 1)) + F::sqrt_half) - V(1).value;
  const V n = __builtin_convertvector(exponent, V::Floats);
  const V square = f * f;
  const V rest = fused(n, V(F::ln2_low), math::polynomial<kLogSeries>(f) * (square * f));
  return fused(n, V(F::ln2_high), f + fused(V(-0.5f), square, rest));
}

}  // namespace
}  // namespace fusedloss::cpu

// Its polynomials are those of its elements.
template <>
struct fusedloss::math::Format<fusedloss::cpu::FloatVector> : Format<float> {};

#endif
