// What every backend must bring: a function marker and the elementary functions the formulas use.
//
// This is the one place where backends may differ. On the device the functions are CUDA's own, or its approximations
// where an argument is known to suit them; on the host they are branch-free polynomials, written as templates over
// float and double, so that a plain loop over them vectorises for every instruction set. They keep NaN, infinities,
// signed zeros of the result's limit and denormals, and they do not set errno or floating-point flags.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>

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

// The larger number; NaN in `a` is passed over.
template <class Acc>
FUSEDLOSS_FN Acc max_ignoring_nan(Acc a, Acc b) {
#if defined(__CUDA_ARCH__)
  return fmax(a, b);
#else
  return a > b ? a : b;
#endif
}

// NaN in `a` wins: a comparison with NaN is false, so the second operand of the conditional is taken.
template <class Acc>
FUSEDLOSS_FN Acc clamp(Acc a, Acc low, Acc high) {
  const Acc raised = a < low ? low : a;
  return raised > high ? high : raised;
}

template <class Acc>
FUSEDLOSS_FN Acc abs(Acc a) {
#if defined(__CUDA_ARCH__)
  return ::fabs(a);
#else
  return std::fabs(a);
#endif
}

// How the polynomials see a floating-point type. Their coefficients interpolate at Chebyshev nodes; what that leaves
// out is named beside them, relative to the result.
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
  static constexpr float ln2 = 0.693147182f;         // off by 1.9e-9
  static constexpr float ln2_high = 0.693359375f;    // few enough bits that n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;  // ln 2 - ln2_high
  static constexpr float exp_normal = -87.33654f;    // exp is denormal below
  static constexpr float two_to_mantissa = 8388608.0f;
  static constexpr int log_terms = 5;
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, to 1.0e-8
  static constexpr float exp_series[] = {0.5f, 0.166665769896987757f, 0.0416665546172045742f, 0.00836317905272257737f,
                                         0.00139261835877134945f};
  // (log(1 + x) - x) / x^2 for 0 <= x <= 1, to 3.6e-9
  static constexpr float log1p_series[] = {-0.499999995222237707f,  0.33333237346213987f,   -0.249967599082639252f,
                                           0.199567079522518358f,   -0.163651528692055351f, 0.130333642382428156f,
                                           -0.0913941377401492021f, 0.0493099734345496944f, -0.0171842669824487093f,
                                           0.00280164199280334992f};
  // (log(1 - x) + x) / x^2 for 0 <= x <= 1/2, to 1.9e-9
  static constexpr float log1m_series[] = {-0.499999997192044374f, -0.333334453878797537f, -0.249926922200359751f,
                                           -0.201829109470103141f, -0.143713556610583245f, -0.305515455204147709f,
                                           0.559631233806252946f,  -1.82419119277052354f,  2.29759094271609407f,
                                           -1.61248115602730151f};
  // As log1p_series, to 1.5e-6
  static constexpr float fast_log1p_series[] = {-0.499907463788986206f, 0.331404268741607666f, -0.236113458871841431f,
                                                0.151027724146842957f,  -0.0678512379527092f,  0.0145883290097117424f};
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
  static constexpr double exp_normal = -708.396418532264;
  static constexpr double two_to_mantissa = 4503599627370496.0;
  static constexpr int log_terms = 10;
  // As above, to 1.7e-17 and 4.4e-17
  static constexpr double exp_series[] = {0.500000000000000102,     0.166666666666666675,   0.0416666666666241279,
                                          0.00833333333333006183,   0.00138888889172137169, 0.000198412698630536169,
                                          0.0000248015212959543751, 2.75572684599970648e-6, 2.76200884454097482e-7,
                                          2.51003854955103191e-8};
  static constexpr double log1p_series[] = {
      -0.49999999999999994,   0.333333333333285468,  -0.249999999993596206,    0.199999999658224018,
      -0.166666656967697302,  0.142856973681769039,  -0.124998021936408679,    0.111094697271044939,
      -0.0998994097833761753, 0.0904403840581878174, -0.0816358369873179002,   0.072060527838905025,
      -0.060245718496051139,  0.0457183288742196421, -0.0300062489220241489,   0.0161774482920837739,
      -0.0067614194988498022, 0.0020308462484097632, -0.000387011110858030387, 0.0000349649999951775279};
};

// 0 where the condition holds, and the value, NaN included, elsewhere. On the host masked rather than selected: a
// conditional invites the compiler to branch around the arithmetic before it, which it cannot vectorise then.
template <class Acc>
FUSEDLOSS_FN Acc zero_if(bool condition, Acc value) {
#if defined(__CUDA_ARCH__)
  return condition ? Acc(0) : value;
#else
  using Int = typename Format<Acc>::Int;
  return std::bit_cast<Acc>(std::bit_cast<Int>(value) & (Int(condition) - 1));
#endif
}

// condition ? a : b, likewise.
template <class Acc>
FUSEDLOSS_FN Acc select(bool condition, Acc a, Acc b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  using Int = typename Format<Acc>::Int;
  const Int chosen = std::bit_cast<Int>(zero_if(!condition, a)), other = std::bit_cast<Int>(zero_if(condition, b));
  return std::bit_cast<Acc>(chosen | other);
#endif
}

// a * b, rounded once. nvcc takes an operator's product, unrounded, into the addition that follows; on the CPU what is
// stored in between is rounded.
template <class Acc>
FUSEDLOSS_FN Acc product(Acc a, Acc b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Acc, float>) return __fmul_rn(a, b);
  if constexpr (std::is_same_v<Acc, double>) return ::fma(a, b, 0.0);
#endif
  return a * b;
}

// a / b for a b that is neither denormal nor close to overflow.
template <class Acc>
FUSEDLOSS_FN Acc fast_divide(Acc a, Acc b) {
#if defined(__CUDA_ARCH__)
  // As __fdividef, without its scaling of a denormal or enormous b.
  if constexpr (std::is_same_v<Acc, float>) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
    return a * reciprocal;
  }
#endif
  return a / b;
}

// kCoefficients[0] + kCoefficients[1] x + ..., the highest first. A recursion: a loop is not unrolled early enough, and
// keeps the loop around it scalar. The coefficients are constants of the code: the device has no access to the array.
template <const auto& kCoefficients, int kFirst = 0, class Acc>
FUSEDLOSS_FN Acc polynomial(Acc x) {
  constexpr auto coefficient = kCoefficients[kFirst];
  if constexpr (kFirst + 1 == std::size(kCoefficients)) {
    return Acc(coefficient);
  } else {
    return polynomial<kCoefficients, kFirst + 1>(x) * x + Acc(coefficient);
  }
}

// x = n ln 2 + r with |r| <= ln(2) / 2, and exp(r) = 1 + r + series r^2 (W. J. Cody and W. Waite, "Software Manual for
// the Elementary Functions", 1980).
template <class Acc>
struct ReducedExp {
  Acc biased_n;  // n + bias, in the lowest bits of the mantissa
  Acc r;
  Acc series;

  FUSEDLOSS_FN Acc exp_r() const { return (series * r + Acc(1)) * r + Acc(1); }
  // 2^n, for n in the range of normal numbers: the shift moves n + bias into the place of the exponent.
  FUSEDLOSS_FN Acc scale() const {
    using F = Format<Acc>;
    return std::bit_cast<Acc>(std::bit_cast<typename F::Int>(biased_n) << F::mantissa_bits);
  }
};

template <class Acc>
FUSEDLOSS_FN ReducedExp<Acc> reduce_exp(Acc x) {
  using F = Format<Acc>;
  constexpr Acc rounder = F::rounder + Acc(F::bias);
  const Acc biased_n = x * F::log2_e + rounder;
  const Acc n = biased_n - rounder;
  const Acc r = (x - n * F::ln2_high) - n * F::ln2_low;
  return {biased_n, r, polynomial<F::exp_series>(r)};
}

// exp(x) for x <= 0, which is all that softmax and sigmoid need. Results below the smallest normal number are 0.
template <class Acc>
FUSEDLOSS_FN Acc exp_nonpositive(Acc x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  using F = Format<Acc>;
  const ReducedExp<Acc> reduced = reduce_exp(x);
  return zero_if(x < F::exp_normal, reduced.exp_r() * reduced.scale());  // NaN is not below
#endif
}

// exp(x) for x <= 0, where half precision will hide what it loses. On the device a product and an approximation of 2^x,
// two instructions rather than eight; the product rounds off x times half a unit in the last place.
template <class Acc>
FUSEDLOSS_FN Acc fast_exp(Acc x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Acc, float>) {
    const float scaled = x * 1.44269504f;  // 1 / ln 2
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(scaled));
    return result;
  }
#endif
  return exp_nonpositive(x);
}

// factor * exp(x) for x <= 0 where exp is normal, rounded about once: the leading 1 of exp(r) and the rest stay apart.
template <class Acc>
FUSEDLOSS_FN Acc times_exp(Acc factor, Acc x) {
  const ReducedExp<Acc> reduced = reduce_exp(x);
  const Acc rest = (reduced.series * reduced.r + Acc(1)) * reduced.r;
  const Acc high = rest + Acc(1), low = rest - (high - Acc(1));
  const Acc product = factor * high;
  // An infinite factor stays one: times a low of 0 or less it would be NaN.
  return (abs(product) < kInfinity<Acc> ? product + factor * low : product) * reduced.scale();
}

// tanh(x) = -t / (t + 2) with t = exp(-2 |x|) - 1, which keeps its relative accuracy near 0.
template <class Acc>
FUSEDLOSS_FN Acc tanh(Acc x) {
#if defined(__CUDA_ARCH__)
  return ::tanh(x);
#else
  // Below -40 exp(-2 |x|) - 1 is -1, and 2^n stays a normal number.
  const ReducedExp<Acc> reduced = reduce_exp(clamp(Acc(-2) * abs(x), Acc(-40), Acc(0)));
  const Acc scale = reduced.scale();
  const Acc t = (reduced.r + reduced.series * reduced.r * reduced.r) * scale + (scale - Acc(1));
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
  // Unsigned: what becomes of NaN and of negative numbers is chosen in the end, and here they wrap around.
  using UInt = std::make_unsigned_t<Int>;
  const Int bits = Int(std::bit_cast<UInt>(denormal ? x * F::two_to_mantissa : x) + UInt(F::one - F::sqrt_half));
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

// log(x) of a float64 x that is no denormal, for a result that will be rounded to Acc. For float32 only what the result
// begins with is float64: n, and near 1 all digits of f; the rest is as small as its digits are fewer.
template <class Acc>
FUSEDLOSS_FN double log_rounded_to(double x) {
#if defined(__CUDA_ARCH__)
  return ::log(x);
#else
  if constexpr (std::is_same_v<Acc, double>) {
    return log(x);
  } else {
    using F = Format<double>;
    using Int = F::Int;
    const Int bits = Int(std::bit_cast<std::uint64_t>(x) + std::uint64_t(F::one - F::sqrt_half));
    const Int exponent = (bits >> F::mantissa_bits) - F::bias;
    const double f = std::bit_cast<double>((bits & ((Int(1) << F::mantissa_bits) - 1)) + F::sqrt_half) - 1;
    const double n = std::bit_cast<double>(exponent + std::bit_cast<Int>(F::rounder)) - F::rounder;

    const double half_square = 0.5 * f * f;
    const Acc narrow = Acc(f), s = narrow / (Acc(2) + narrow), z = s * s;
    Acc series = Acc(2) / Acc(2 * Format<Acc>::log_terms + 1);
    for (int k = Format<Acc>::log_terms - 1; k >= 1; --k) series = series * z + Acc(2) / Acc(2 * k + 1);
    const double finite =
        n * (F::ln2_high + F::ln2_low) + (f - (half_square - double(s * (Acc(half_square) + z * series))));

    const double positive = x == kInfinity<double> ? x : finite;
    const double zero_or_nan = x == 0 ? -kInfinity<double> : kNaN<double>;
    return x > 0 ? positive : zero_or_nan;
  }
#endif
}

// log(x) for x in [0, 1/2], where half precision will hide what it loses. Nearer to 1 the approximation on the device,
// which is off by a part of 1, has fewer digits of the result.
template <class Acc>
FUSEDLOSS_FN Acc fast_log(Acc x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Acc, float>) return __logf(x);
#endif
  return log(x);
}

// log(1 + x) for x in [0, 1], as softplus needs it: no division, and no exponent to take apart.
template <class Acc>
FUSEDLOSS_FN Acc log1p_unit(Acc x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Acc, double>) return ::log1p(x);
#endif
  return polynomial<Format<Acc>::log1p_series>(x) * (x * x) + x;
}

// The same, where half precision will hide what it loses: a shorter series on the device.
template <class Acc>
FUSEDLOSS_FN Acc fast_log1p_unit(Acc x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Acc, float>) return polynomial<Format<Acc>::fast_log1p_series>(x) * (x * x) + x;
#endif
  return log1p_unit(x);
}

// log(1 - x) for x in [0, 1/2], where half precision will hide what it loses on the device: by the shorter series, of
// the quotient of both sides.
template <class Acc>
FUSEDLOSS_FN Acc fast_log1m(Acc x) {
#if defined(__CUDA_ARCH__)
  return -fast_log1p_unit(fast_divide(x, Acc(1) - x));
#else
  return polynomial<Format<Acc>::log1m_series>(x) * (x * x) - x;
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
