// What every backend must bring: a function marker and the elementary functions the formulas use.
//
// This is the one place where backends may differ. On the device the functions are CUDA's own; on the host they are
// branch-free polynomials, written as templates over float and double, so that a plain loop over them vectorises for
// every instruction set. They keep NaN, infinities, signed zeros of the result's limit and denormals, and they do not
// set errno or floating-point flags.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

// Always inlined on the host: a copy emitted while wider instructions are enabled would be merged by the linker with
// the baseline's copy, and crash processors that lack them.
#if defined(__CUDACC__)
#define FUSEDLOSS_FN __host__ __device__ __forceinline__
#else
#define FUSEDLOSS_FN [[gnu::always_inline]] inline
#endif

namespace fusedloss::math {

template <class Acc>
inline constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <class Acc>
inline constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();

// NaN in `a` wins: a comparison with NaN is false, so the second operand of the conditional is taken.
template <class Acc>
FUSEDLOSS_FN Acc clamp(Acc a, Acc low, Acc high) {
  const Acc raised = a < low ? low : a;
  return raised > high ? high : raised;
}

template <class Acc>
FUSEDLOSS_FN Acc abs(Acc a) {
  return std::fabs(a);
}

// How the polynomials see a floating-point type.
template <class Acc>
struct Format;

template <>
struct Format<float> {
  using Int = std::int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Int bias = 127;
  static constexpr Int sqrt_half = 0x3f3504f3;       // bits of sqrt(1/2)
  static constexpr Int one = 0x3f800000;             // bits of 1
  static constexpr float rounder = 12582912.0f;      // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float log2_e = 1.44269504f;       // 1 / ln 2
  static constexpr float ln2_high = 0.693359375f;    // few enough bits that n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;  // ln 2 - ln2_high
  static constexpr float exp_low = -104.0f;          // exp rounds to 0 below
  static constexpr float exp_high = 89.0f;           // exp is infinite above
  static constexpr float exp_normal = -87.33654f;    // exp is denormal below
  static constexpr float two_to_mantissa = 8388608.0f;
  static constexpr int exp_terms = 7;
  static constexpr int log_terms = 5;
};

template <>
struct Format<double> {
  using Int = std::int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Int bias = 1023;
  static constexpr Int sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr Int one = 0x3ff0000000000000;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_low = -746.0;
  static constexpr double exp_high = 710.0;
  static constexpr double exp_normal = -708.396418532264;
  static constexpr double two_to_mantissa = 4503599627370496.0;
  static constexpr int exp_terms = 13;
  static constexpr int log_terms = 10;
};

// 2^n, for n in the range of normal numbers.
template <class Acc>
FUSEDLOSS_FN Acc power_of_two(typename Format<Acc>::Int n) {
  using F = Format<Acc>;
  return std::bit_cast<Acc>((n + F::bias) << F::mantissa_bits);
}

// x = n ln 2 + r with |r| <= ln(2) / 2, and exp(r) = 1 + r + tail from its Taylor series (W. J. Cody and W. Waite,
// "Software Manual for the Elementary Functions", 1980). What the series leaves out is below a tenth of an ulp.
template <class Acc>
struct ReducedExp {
  typename Format<Acc>::Int n;
  Acc r;
  Acc tail;

  // exp(r). What 1 + r loses to rounding joins the tail: the result is within 0.85 ulp rather than 1.05.
  FUSEDLOSS_FN Acc exp_r() const {
    const Acc sum = Acc(1) + r;
    const Acc lost = r - (sum - Acc(1));
    return sum + (tail + lost);
  }
};

template <class Acc>
FUSEDLOSS_FN ReducedExp<Acc> reduce_exp(Acc x) {
  using F = Format<Acc>;
  const Acc shifted = x * F::log2_e + F::rounder;
  const Acc n = shifted - F::rounder;
  const Acc r = (x - n * F::ln2_high) - n * F::ln2_low;
  Acc inverse_factorial[F::exp_terms + 1] = {1, 1};
  for (int k = 2; k <= F::exp_terms; ++k) inverse_factorial[k] = inverse_factorial[k - 1] / Acc(k);
  Acc series = inverse_factorial[F::exp_terms];
  for (int k = F::exp_terms - 1; k >= 2; --k) series = series * r + inverse_factorial[k];
  return {std::bit_cast<typename F::Int>(shifted) - std::bit_cast<typename F::Int>(F::rounder), r, series * r * r};
}

template <class Acc>
FUSEDLOSS_FN Acc exp(Acc x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  using F = Format<Acc>;
  const ReducedExp<Acc> reduced = reduce_exp(clamp(x, F::exp_low, F::exp_high));
  // Two factors: 2^n alone leaves the range of normal numbers where exp(x) is denormal or just below overflow.
  const auto half = reduced.n >> 1;
  return reduced.exp_r() * power_of_two<Acc>(half) * power_of_two<Acc>(reduced.n - half);
#endif
}

// exp(x) for x <= 0, as softmax needs it: fewer operations. Results below the smallest normal number are 0. They are
// masked rather than selected: a conditional invites the compiler to branch around the arithmetic it cannot vectorise.
template <class Acc>
FUSEDLOSS_FN Acc exp_nonpositive(Acc x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  using F = Format<Acc>;
  using Int = typename F::Int;
  const ReducedExp<Acc> reduced = reduce_exp(x);
  const Acc result = reduced.exp_r() * power_of_two<Acc>(reduced.n);
  const Int keep = Int(x < F::exp_normal) - 1;  // no bits below, all bits above and for NaN
  return std::bit_cast<Acc>(std::bit_cast<Int>(result) & keep);
#endif
}

// tanh(x) = -t / (t + 2) with t = exp(-2 |x|) - 1, which keeps its relative accuracy near 0.
template <class Acc>
FUSEDLOSS_FN Acc tanh(Acc x) {
#if defined(__CUDA_ARCH__)
  return ::tanh(x);
#else
  // Below -40 exp(-2 |x|) - 1 is -1, and 2^n stays a normal number.
  const auto [n, r, tail] = reduce_exp(clamp(Acc(-2) * abs(x), Acc(-40), Acc(0)));
  const Acc scale = power_of_two<Acc>(n);
  const Acc t = (r + tail) * scale + (scale - Acc(1));
  return std::copysign(-t / (t + Acc(2)), x);
#endif
}

// log(m 2^n) = n ln 2 + log(1 + f), m in [sqrt(1/2), sqrt(2)), f = m - 1, from the series of atanh(f / (2 + f)); the
// terms are ordered as in fdlibm's e_log.c so that the leading f is added last.
template <class Acc>
FUSEDLOSS_FN Acc log(Acc x) {
#if defined(__CUDA_ARCH__)
  return ::log(x);
#else
  using F = Format<Acc>;
  using Int = typename F::Int;
  const bool denormal = x < std::numeric_limits<Acc>::min();
  const Int bits = std::bit_cast<Int>(denormal ? x * F::two_to_mantissa : x) + (F::one - F::sqrt_half);
  const Int exponent = (bits >> F::mantissa_bits) - F::bias - (denormal ? F::mantissa_bits : 0);
  const Acc f = std::bit_cast<Acc>((bits & ((Int(1) << F::mantissa_bits) - 1)) + F::sqrt_half) - Acc(1);
  // Exact for small integers, and vectorises where an instruction to convert 64-bit integers is missing.
  const Acc n = std::bit_cast<Acc>(exponent + std::bit_cast<Int>(F::rounder)) - F::rounder;

  const Acc s = f / (Acc(2) + f);
  const Acc z = s * s;
  Acc series = Acc(2) / Acc(2 * F::log_terms + 1);
  for (int k = F::log_terms - 1; k >= 1; --k) series = series * z + Acc(2) / Acc(2 * k + 1);
  const Acc half_square = Acc(0.5) * f * f;
  const Acc finite = n * F::ln2_high - ((half_square - (s * (half_square + z * series) + n * F::ln2_low)) - f);

  const Acc positive = x == kInfinity<Acc> ? x : finite;
  const Acc zero_or_nan = x == Acc(0) ? -kInfinity<Acc> : kNaN<Acc>;
  return x > Acc(0) ? positive : zero_or_nan;
#endif
}

// log(1 + x) for x in [-1, 1]: the rounding error of 1 + x is known exactly and put back to first order.
template <class Acc>
FUSEDLOSS_FN Acc log1p(Acc x) {
#if defined(__CUDA_ARCH__)
  return ::log1p(x);
#else
  const Acc y = Acc(1) + x;
  const Acc lost = x - (y - Acc(1));
  return y == Acc(0) ? -kInfinity<Acc> : log(y) + lost / y;
#endif
}

}  // namespace fusedloss::math
