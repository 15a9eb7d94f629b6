// float32 by the vector, for the loops that a compiler does not vectorise well: a type that the formulas of csrc/math
// take for a number, and an exponential that looks up a table in a register. Float64, and sets that are switched on
// without it, have plain loops over numbers.
//
// The including file defines FUSEDLOSS_LANES, the float32 lanes of the set that it has switched on: 8 with AVX2, FMA
// and F16C, 16 with AVX-512. Where it has switched on none, there is no vector.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../../math/portable.h"

#if !defined(FUSEDLOSS_LANES)
#define FUSEDLOSS_LANES 4
#endif

// That a vector is returned otherwise where its set is not switched on concerns nobody: whatever returns one is
// inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if FUSEDLOSS_LANES == 8 || FUSEDLOSS_LANES == 16
#define FUSEDLOSS_VECTORS 1
#include <immintrin.h>

namespace fusedloss::cpu {
namespace {

typedef float Floats __attribute__((vector_size(4 * FUSEDLOSS_LANES)));
typedef std::int32_t Ints __attribute__((vector_size(4 * FUSEDLOSS_LANES)));
typedef std::uint32_t Unsigned __attribute__((vector_size(4 * FUSEDLOSS_LANES)));  // whose sums wrap around
typedef double Doubles __attribute__((vector_size(4 * FUSEDLOSS_LANES)));          // of half as many lanes

inline constexpr Ints kLaneNumbers = {
    0, 1, 2,  3,  4,  5,  6,  7,
#if FUSEDLOSS_LANES == 16
    8, 9, 10, 11, 12, 13, 14, 15,
#endif
};

// What the two sets spell differently. a * b + c and c - a * b, rounded once; the larger number; the entries of a table
// that the lowest bits name; float16; integers of 16 bits; float64; the first lanes of what lies in memory, and of
// `rest` the others.
#if FUSEDLOSS_LANES == 8
FUSEDLOSS_FN Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
FUSEDLOSS_FN Floats fused_negative(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
FUSEDLOSS_FN Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
FUSEDLOSS_FN Ints entries(Ints table, Ints index) {
  return Ints(_mm256_permutevar8x32_epi32(__m256i(table), __m256i(index)));
}
FUSEDLOSS_FN Floats load_float16(const void* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
FUSEDLOSS_FN void store_float16(Floats x, void* to) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
FUSEDLOSS_FN Ints load_16_bits(const void* from) {
  return Ints(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
FUSEDLOSS_FN void store_16_bits(Ints x, void* to) {
  const __m256i packed = _mm256_packus_epi32(__m256i(x), __m256i(x));
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
}
FUSEDLOSS_FN Doubles widened(__m128 x) { return _mm256_cvtps_pd(x); }
FUSEDLOSS_FN Floats load_first(const float* from, std::int64_t count, Floats rest) {
  const Ints mask = kLaneNumbers < static_cast<std::int32_t>(count);
  const Floats loaded = _mm256_maskload_ps(from, __m256i(mask));
  return mask ? loaded : rest;
}
#else
FUSEDLOSS_FN Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
FUSEDLOSS_FN Floats fused_negative(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
FUSEDLOSS_FN Floats larger(Floats a, Floats b) { return _mm512_maskz_max_ps(__mmask16(-1), a, b); }
FUSEDLOSS_FN Ints entries(Ints table, Ints index) {
  return Ints(_mm512_maskz_permutexvar_epi32(__mmask16(-1), __m512i(index), __m512i(table)));
}
FUSEDLOSS_FN Floats load_float16(const void* from) {
  return _mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
FUSEDLOSS_FN void store_float16(Floats x, void* to) {
  const __m256i rounded = _mm512_maskz_cvtps_ph(__mmask16(-1), x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(static_cast<__m256i*>(to), rounded);
}
FUSEDLOSS_FN Ints load_16_bits(const void* from) {
  const __m256i loaded = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return Ints(_mm512_maskz_cvtepu16_epi32(__mmask16(-1), loaded));
}
FUSEDLOSS_FN void store_16_bits(Ints x, void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(__mmask16(-1), __m512i(x)));
}
FUSEDLOSS_FN Doubles widened(__m256 x) { return _mm512_maskz_cvtps_pd(__mmask8(-1), x); }
FUSEDLOSS_FN Floats load_first(const float* from, std::int64_t count, Floats rest) {
  const auto mask = static_cast<__mmask16>(count < 16 ? (1u << std::max<std::int64_t>(count, 0)) - 1 : 0xffff);
  return _mm512_mask_loadu_ps(rest, mask, from);
}
#endif

// Calls body(0), body(1), ... body(kCount - 1), each with a constant: what is indexed by it stays in registers.
template <int kCount, class Body>
FUSEDLOSS_FN void unrolled(Body body) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      __attribute__((always_inline)) { (body(i), ...); }(std::make_integer_sequence<int, kCount>());
}

// Lanes combined to one number, half with half: combine is a function of vectors and of numbers.
template <class Vector, class Combine>
FUSEDLOSS_FN auto by_halves(Vector lanes, Combine combine) {
  constexpr int kHalf = sizeof(Vector) / sizeof(lanes[0]) / 2;
  if constexpr (kHalf == 1) {
    return combine(lanes[0], lanes[1]);
  } else {
    return [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      return by_halves(
          combine(__builtin_shufflevector(lanes, lanes, i...), __builtin_shufflevector(lanes, lanes, (i + kHalf)...)),
          combine);
    }(std::make_integer_sequence<int, kHalf>());
  }
}

// A function of vectors, of each of some. They take each step together: one after the other, a chain of dependent
// instructions fills the processor's queue before it sees the next chain.
template <class Result, class Function, class... Operand>
FUSEDLOSS_FN Result each(Function function, const Operand&... operand) {
  Result result;
  unrolled<Result::kCount>([&](int i) { result.part[i] = function(operand.part[i]...); });
  return result;
}

// Some vectors of integers: the bits of floats, or for each lane a condition, all ones or zeros.
template <int kVectors>
struct IntVectors {
  static constexpr int kCount = kVectors;
  Ints part[kVectors];

  IntVectors() = default;
  FUSEDLOSS_FN explicit IntVectors(std::int32_t x) {
    unrolled<kCount>([&](int i) { part[i] = Ints{} + x; });
  }

  FUSEDLOSS_FN friend IntVectors operator+(IntVectors a, IntVectors b) {
    return each<IntVectors>([](Ints a, Ints b) { return Ints(Unsigned(a) + Unsigned(b)); }, a, b);
  }
  FUSEDLOSS_FN friend IntVectors operator-(IntVectors a, IntVectors b) {
    return each<IntVectors>([](Ints a, Ints b) { return Ints(Unsigned(a) - Unsigned(b)); }, a, b);
  }
  FUSEDLOSS_FN friend IntVectors operator&(IntVectors a, IntVectors b) {
    return each<IntVectors>([](Ints a, Ints b) { return a & b; }, a, b);
  }
  FUSEDLOSS_FN friend IntVectors operator~(IntVectors a) {
    return each<IntVectors>([](Ints a) { return ~a; }, a);
  }
  FUSEDLOSS_FN friend IntVectors operator<<(IntVectors a, int by) {
    return each<IntVectors>([=](Ints a) { return a << by; }, a);
  }
  FUSEDLOSS_FN friend IntVectors operator>>(IntVectors a, int by) {
    return each<IntVectors>([=](Ints a) { return a >> by; }, a);
  }
};

// Some vectors of float32, a number to the formulas.
template <int kVectors>
struct FloatVectors {
  static constexpr int kCount = kVectors, kLanes = kVectors * FUSEDLOSS_LANES;
  using Bits = IntVectors<kVectors>;
  Floats part[kVectors];

  FloatVectors() = default;
  FUSEDLOSS_FN explicit FloatVectors(float x) {
    unrolled<kCount>([&](int i) { part[i] = x - Floats{}; });
  }

  FUSEDLOSS_FN static FloatVectors load(const float* from) {
    FloatVectors loaded;  // part by part: all at once, they would go through memory once more
    unrolled<kCount>([&](int i) { std::memcpy(&loaded.part[i], from + i * FUSEDLOSS_LANES, sizeof(Floats)); });
    return loaded;
  }
  FUSEDLOSS_FN void store(float* to) const {
    unrolled<kCount>([&](int i) { std::memcpy(to + i * FUSEDLOSS_LANES, &part[i], sizeof(Floats)); });
  }
  FUSEDLOSS_FN float sum() const {
    Floats lanes = part[0];
    for (int i = 1; i < kCount; ++i) lanes += part[i];
    return by_halves(lanes, [](auto a, auto b) { return a + b; });
  }
  FUSEDLOSS_FN Bits bits() const {
    return each<Bits>([](Floats x) { return std::bit_cast<Ints>(x); }, *this);
  }
  FUSEDLOSS_FN static FloatVectors of_bits(Bits bits) {
    return each<FloatVectors>([](Ints x) { return std::bit_cast<Floats>(x); }, bits);
  }

  FUSEDLOSS_FN friend FloatVectors operator-(FloatVectors a) {
    return each<FloatVectors>([](Floats a) { return -a; }, a);
  }
  FUSEDLOSS_FN friend FloatVectors operator+(FloatVectors a, FloatVectors b) {
    return each<FloatVectors>([](Floats a, Floats b) { return a + b; }, a, b);
  }
  FUSEDLOSS_FN friend FloatVectors operator-(FloatVectors a, FloatVectors b) {
    return each<FloatVectors>([](Floats a, Floats b) { return a - b; }, a, b);
  }
  FUSEDLOSS_FN friend FloatVectors operator*(FloatVectors a, FloatVectors b) {
    return each<FloatVectors>([](Floats a, Floats b) { return a * b; }, a, b);
  }
  FUSEDLOSS_FN friend FloatVectors operator/(FloatVectors a, FloatVectors b) {
    return each<FloatVectors>([](Floats a, Floats b) { return a / b; }, a, b);
  }
  FUSEDLOSS_FN friend Bits operator<(FloatVectors a, FloatVectors b) {
    return each<Bits>([](Floats a, Floats b) { return a < b; }, a, b);
  }
  FUSEDLOSS_FN friend Bits operator<=(FloatVectors a, FloatVectors b) {
    return each<Bits>([](Floats a, Floats b) { return a <= b; }, a, b);
  }
  FUSEDLOSS_FN friend Bits operator==(FloatVectors a, FloatVectors b) {
    return each<Bits>([](Floats a, Floats b) { return a == b; }, a, b);
  }

  FUSEDLOSS_FN friend FloatVectors select(Bits condition, FloatVectors a, FloatVectors b) {
    return each<FloatVectors>([](Ints is, Floats a, Floats b) { return is ? a : b; }, condition, a, b);
  }
  FUSEDLOSS_FN friend FloatVectors zero_if(Bits condition, FloatVectors x) { return of_bits(x.bits() & ~condition); }
  FUSEDLOSS_FN friend FloatVectors zero_if(bool condition, FloatVectors x) { return condition ? FloatVectors(0) : x; }
  FUSEDLOSS_FN friend FloatVectors abs(FloatVectors x) { return of_bits(x.bits() & Bits(0x7fffffff)); }
  FUSEDLOSS_FN friend FloatVectors max_ignoring_nan(FloatVectors a, FloatVectors b) {
    return each<FloatVectors>([](Floats a, Floats b) { return larger(a, b); }, a, b);
  }
  FUSEDLOSS_FN friend FloatVectors fused(FloatVectors a, FloatVectors b, FloatVectors c) {
    return each<FloatVectors>([](Floats a, Floats b, Floats c) { return fused(a, b, c); }, a, b, c);
  }
  FUSEDLOSS_FN friend FloatVectors fused_negative(FloatVectors a, FloatVectors b, FloatVectors c) {
    return each<FloatVectors>([](Floats a, Floats b, Floats c) { return fused_negative(a, b, c); }, a, b, c);
  }
};
using FloatVector = FloatVectors<1>;

// by_halves of several vectors at once, as many as each has lanes: the result's lane i is what vectors[i] combines to.
// Each step takes half of the vectors of the one before, where by_halves takes as many steps for each vector alone.
template <int kSegment = 0, class Vector, std::size_t kCount, class Combine>
FUSEDLOSS_FN Vector each_by_halves(const Vector (&vectors)[kCount], Combine combine) {
  constexpr int kLanes = sizeof(Vector) / sizeof(vectors[0][0]), kHalf = (kSegment ? kSegment : kLanes) / 2;
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    // A vector has segments of 2 kHalf lanes, each of another; the next one's are half as long, of twice as many.
    constexpr auto from = [](int lane) {
      const int segment = lane / kHalf;
      return segment / 2 * 2 * kHalf + lane % kHalf + segment % 2 * kLanes;
    };
    Vector fewer[kCount / 2];
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      for (std::size_t v = 0; v < kCount / 2; ++v) {
        const Vector a = vectors[v], b = vectors[v + kCount / 2];
        fewer[v] =
            combine(__builtin_shufflevector(a, b, from(i)...), __builtin_shufflevector(a, b, (from(i) + kHalf)...));
      }
    }(std::make_integer_sequence<int, kLanes>());
    return each_by_halves<kHalf>(fewer, combine);
  }
}

// Sums in float64 of the lanes of float32 vectors, apart.
struct WideSums {
  Doubles low = {}, high = {};

  FUSEDLOSS_FN void add(FloatVector x) {
    constexpr int kHalf = FUSEDLOSS_LANES / 2;
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      low += widened(__builtin_shufflevector(x.part[0], x.part[0], i...));
      high += widened(__builtin_shufflevector(x.part[0], x.part[0], (i + kHalf)...));
    }(std::make_integer_sequence<int, kHalf>());
  }
};

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
  static constexpr int kEntries = FUSEDLOSS_LANES;
  static constexpr int kShift = kEntries == 8 ? 20 : 19;
  // (exp(r) - 1) / r = 1 + quadratic r + cubic r^2 at Chebyshev nodes; exp(r) to 3.8e-8 with 8 entries, to 2.4e-9
  // with 16.
  static constexpr float kQuadratic = kEntries == 8 ? 0.50005865180138854f : 0.500014662434374272f;
  static constexpr float kCubic = kEntries == 8 ? 0.166678396869694294f : 0.166669599143713679f;
};

// exp(x) for x <= 0; as math::exp_nonpositive, results below the smallest normal number are 0. ln 2 is one constant,
// where the polynomial has two: what the second would add is a tenth of what the difference x of two logits has been
// rounded by.
template <int kVectors>
FUSEDLOSS_FN FloatVectors<kVectors> exp_nonpositive(FloatVectors<kVectors> x) {
  using F = math::Format<float>;
  using V = FloatVectors<kVectors>;
  using T = ExpTable;
  Ints table;
  std::memcpy(&table, T::kBits, sizeof(table));
  const V n = fused(x, V(T::kEntries * F::log2_e), V(F::rounder));
  const V r = fused_negative(n - V(F::rounder), V(F::ln2 / T::kEntries), x);
  const auto factor = each<typename V::Bits>([&](Ints n) { return entries(table, n); }, n.bits());
  const V power = V::of_bits(factor + (n.bits() << T::kShift));
  const V rest = fused(fused(r, V(T::kCubic), V(T::kQuadratic)), r, V(1));
  return zero_if(x < V(F::exp_normal), fused(rest, r * power, power));  // NaN is not below
}

// As the function of numbers, without a division: (log(1 + f) - f + f^2 / 2) / f^3 at Chebyshev nodes, to 3.2e-9 of
// the result. For x in [0, 1/2]; of 0 it makes about -104, of NaN some number.
inline constexpr float kLogSeries[] = {0.333333311800300481f,  -0.24999996957950882f,  0.200007157488921017f,
                                       -0.166678023195012541f, 0.142490576456974804f,  -0.124256873314511061f,
                                       0.116854199234867393f,  -0.114797338466376356f, 0.0697161147145117783f};
template <int kVectors>
FUSEDLOSS_FN FloatVectors<kVectors> fast_log(FloatVectors<kVectors> x) {
  using F = math::Format<float>;
  using V = FloatVectors<kVectors>;
  using B = typename V::Bits;
  const B denormal = x < V(std::numeric_limits<float>::min());
  const B bits = select(denormal, x * V(F::two_to_mantissa), x).bits() + B(F::one - F::sqrt_half);
  const B exponent = (bits >> F::mantissa_bits) - B(F::bias) - (denormal & B(F::mantissa_bits));
  const V f = V::of_bits((bits & B((1 << F::mantissa_bits) - 1)) + B(F::sqrt_half)) - V(1);
  const V n = each<V>([](Ints n) { return __builtin_convertvector(n, Floats); }, exponent);
  const V square = f * f;
  const V rest = fused(n, V(F::ln2_low), math::polynomial<kLogSeries>(f) * (square * f));
  return fused(n, V(F::ln2_high), f + fused(V(-0.5f), square, rest));
}

}  // namespace
}  // namespace fusedloss::cpu

// Its polynomials are those of its elements.
template <int kVectors>
struct fusedloss::math::Format<fusedloss::cpu::FloatVectors<kVectors>> : Format<float> {};

#endif
