// Vectors of float32, compiled for the set that -DFUSEDLOSS_LANES names: their exponential and logarithm over the whole
// range, in units in the last place, half precision there and back as it is done one by one, and what becomes of lanes.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/vector.h"

using namespace fusedloss::cpu;

namespace {

constexpr int kVector = FloatVector::kLanes;
constexpr float kNormal = fusedloss::math::Format<float>::exp_normal;

bool is_supported() {
  return kVector == 8 ? __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                      : __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

double ulps(float result, double truth) {
  if (std::isnan(truth)) return std::isnan(result) ? 0 : 1e9;
  int exponent;
  std::frexp(truth, &exponent);
  return std::fabs(result - truth) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

// Every 61st float between low and high, and NaN, a vector at a time.
template <class Ours, class Truth>
void sweep(const char* name, double bound, float low, float high, Ours ours, Truth truth, bool takes_nan = true) {
  double worst = 0;
  float x[kVector], y[kVector];
  int lanes = 0;
  const auto judge = [&] {
    ours(FloatVector::load(x)).store(y);
    for (int i = 0; i < lanes; ++i) {
      const double error = ulps(y[i], truth(static_cast<double>(x[i])));
      EXPECT(error <= bound, "%s(%.9g) is %.9g, off by %.3g units", name, x[i], y[i], error);
      worst = std::max(worst, error);
    }
    lanes = 0;
  };
  std::fill_n(x, kVector, high);
  for (std::uint64_t bits = 0; bits <= 0xffffffffu; bits += 61) {
    const float number = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if ((low <= number && number <= high) || (takes_nan && std::isnan(number))) x[lanes++] = number;
    if (lanes == kVector) judge();
  }
  judge();
  std::printf("%s: at most %.3f units in the last place\n", name, worst);
}

template <int kVectors>
FloatVector in_each_place(FloatVector x) {
  FloatVectors<kVectors> all;
  std::fill_n(all.part, kVectors, x.part[0]);
  all = exp_nonpositive(all);
  for (const Floats& other : all.part) {
    for (int i = 0; i < kVector; ++i) {
      const bool same = std::isnan(all.part[0][i]) || other[i] == all.part[0][i];
      EXPECT(same, "exp(%g) is not the same in each of %d vectors", x.part[0][i], kVectors);
    }
  }
  FloatVector last;
  last.part[0] = all.part[kVectors - 1];
  return last;
}

void test_exponential() {
  const auto exponential = [](double x) { return x < kNormal ? 0.0 : std::exp(x); };
  // One constant for ln 2: what it lacks is multiplied by x.
  sweep("exp, x >= -10", 1.5, -10, 0, [](FloatVector x) { return in_each_place<1>(x); }, exponential);
  sweep("exp", 5.5, -HUGE_VALF, 0, [](FloatVector x) { return in_each_place<4>(x); }, exponential);
}

// As binary cross entropy has it: no result below -100 matters, and what is no probability is refused.
void test_logarithm() {
  const auto limited = [](FloatVector x) {
    FloatVector log = fast_log(x);
    for (int i = 0; i < kVector; ++i) log.part[0][i] = std::max(log.part[0][i], -100.0f);
    return log;
  };
  sweep("log, x <= 1/2", 1.5, 0, 0.5, limited, [](double x) { return std::max(std::log(x), -100.0); }, false);
}

// Every number of half precision there and back, and floats rounded to it, as it is done one by one.
template <class Half>
void test_half(const char* name) {
  Half narrow[kVector], back[kVector];
  float wide[kVector];
  for (std::uint32_t first = 0; first < 65536; first += kVector) {
    for (int i = 0; i < kVector; ++i) narrow[i].bits = static_cast<std::uint16_t>(first + i);
    const auto loaded = load_vectors<FloatVector>(narrow);
    loaded.store(wide);
    store_vectors(loaded, back);
    for (int i = 0; i < kVector; ++i) {
      const float alone = convert<float>(narrow[i]);
      const bool same = std::isnan(alone) ? std::isnan(wide[i]) && std::isnan(convert<float>(back[i]))
                                          : wide[i] == alone && std::signbit(wide[i]) == std::signbit(alone) &&
                                                back[i].bits == narrow[i].bits;
      EXPECT(same, "%s %04x is %g, and comes back as %04x", name, narrow[i].bits, wide[i], back[i].bits);
    }
  }
  for (std::uint64_t bits = 0; bits + 61 * kVector <= 0xffffffffu; bits += 61 * kVector) {
    for (int i = 0; i < kVector; ++i) wide[i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits + 61 * i));
    store_vectors(FloatVector::load(wide), back);
    for (int i = 0; i < kVector; ++i) {
      const std::uint16_t alone = round_to<Half>(wide[i]).bits;
      const bool same = std::isnan(wide[i]) ? std::isnan(convert<float>(back[i])) : back[i].bits == alone;
      EXPECT(same, "%.9g is rounded to %s %04x, not %04x", wide[i], name, back[i].bits, alone);
    }
  }
}

// Runs of half precision of any length, as it is done one by one: where they end, memory does, too.
template <class Half>
void test_runs(const char* name) {
  for (int count = 0; count <= 3 * kVector; ++count) {
    std::vector<Half> narrow(count), back(count);
    std::vector<float> wide(count);
    for (int i = 0; i < count; ++i) narrow[i] = round_to<Half>(static_cast<float>(i + 1));
    load_each(wide.data(), count, static_cast<const Half*>(narrow.data()));
    store_each(back.data(), count, static_cast<const float*>(wide.data()));
    for (int i = 0; i < count; ++i) {
      EXPECT(wide[i] == i + 1 && back[i].bits == narrow[i].bits, "%s %d of %d is %g", name, i, count, wide[i]);
    }
    for (int rest = -1; count >= kVector && rest <= kVector + 1; ++rest) {
      const Floats end = load_row_end(narrow.data() + count - std::clamp(rest, 0, kVector), rest, Floats{} - 2);
      for (int i = 0; i < kVector; ++i) {
        const float expected = i < rest ? static_cast<float>(count - std::min(rest, kVector) + i + 1) : -2;
        EXPECT(end[i] == expected, "%s, lane %d of %d at the end is %g, not %g", name, i, rest, end[i], expected);
      }
    }
  }
}

// The lanes of one vector, of several at once, and of sums in float64; and of a vector that memory has a part of.
void test_lanes() {
  const auto minus = [](auto a, auto b) { return 3 * a - b; };  // whose order shows
  Floats vectors[kVector];
  for (int v = 0; v < kVector; ++v) {
    for (int i = 0; i < kVector; ++i) vectors[v][i] = static_cast<float>((7 * v + 5 * i * i) % 11);
  }
  const Floats combined = each_by_halves(vectors, minus);
  for (int v = 0; v < kVector; ++v) {
    const float alone = by_halves(vectors[v], minus);
    EXPECT(combined[v] == alone, "vector %d of several is %g, alone %g", v, combined[v], alone);
  }
  WideSums sums;
  FloatVector x;
  for (int i = 0; i < kVector; ++i) x.part[0][i] = static_cast<float>(i + 1);
  sums.add(x);
  sums.add(x);
  const double total = by_halves(sums.low, [](auto a, auto b) { return a + b; }) * 1e6 +
                       by_halves(sums.high, [](auto a, auto b) { return a + b; });
  double expected = 0;
  for (int i = 0; i < kVector; ++i) expected += 2.0 * (i + 1) * (i < kVector / 2 ? 1e6 : 1);
  EXPECT(total == expected, "the sums are %.17g, not %.17g", total, expected);

  for (int count = -3; count <= kVector + 3; ++count) {
    float some[kVector];
    std::fill_n(some, kVector, 1.0f);
    const Floats loaded = load_first(some + kVector - std::clamp(count, 0, kVector), count, FloatVector(-2).part[0]);
    for (int i = 0; i < kVector; ++i) {
      EXPECT(loaded[i] == (i < count ? 1 : -2), "lane %d of %d is %g", i, count, loaded[i]);
    }
  }
}

}  // namespace

int main() {
  if (!is_supported()) {
    std::printf("this processor has no vectors of %d lanes\n", kVector);
    return 77;
  }
  test_exponential();
  test_logarithm();
  test_half<Float16>("float16");
  test_half<BFloat16>("bfloat16");
  test_runs<Float16>("float16");
  test_runs<BFloat16>("bfloat16");
  test_lanes();
  return finish("test_vectors");
}
