// Vectors of float32, compiled for the set that -DFUSEDLOSS_LANES names: their exponential and logarithm over the whole
// range, in units in the last place, and float16 there and back as it is done one by one.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>

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
  FloatVector all[kVectors];
  std::fill_n(all, kVectors, x);
  exp_nonpositive_each(all);
  for (const FloatVector& other : all) {
    for (int i = 0; i < kVector; ++i) {
      const bool same = std::isnan(all[0].value[i]) || other.value[i] == all[0].value[i];
      EXPECT(same, "exp(%g) is not the same in each of %d vectors", x.value[i], kVectors);
    }
  }
  return all[kVectors - 1];
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
    for (int i = 0; i < kVector; ++i) log.value[i] = log.value[i] < -100 ? -100 : log.value[i];
    return log;
  };
  sweep("log, x <= 1/2", 1.5, 0, 0.5, limited, [](double x) { return std::max(std::log(x), -100.0); }, false);
}

void test_float16() {
  Float16 narrow[kVector], back[kVector];
  float wide[kVector];
  for (std::uint32_t first = 0; first < 65536; first += kVector) {
    for (int i = 0; i < kVector; ++i) narrow[i].bits = static_cast<std::uint16_t>(first + i);
    load_float16(narrow).store(wide);
    store_float16(FloatVector::load(wide), back);
    for (int i = 0; i < kVector; ++i) {
      const float alone = convert<float>(narrow[i]);
      const bool same = std::isnan(alone) ? std::isnan(wide[i]) && std::isnan(convert<float>(back[i]))
                                          : wide[i] == alone && std::signbit(wide[i]) == std::signbit(alone) &&
                                                back[i].bits == narrow[i].bits;
      EXPECT(same, "float16 %04x is %g, and comes back as %04x", narrow[i].bits, wide[i], back[i].bits);
    }
  }
  for (std::uint64_t bits = 0; bits + 61 * kVector <= 0xffffffffu; bits += 61 * kVector) {
    for (int i = 0; i < kVector; ++i) wide[i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits + 61 * i));
    store_float16(FloatVector::load(wide), back);
    for (int i = 0; i < kVector; ++i) {
      const std::uint16_t alone = round_to<Float16>(wide[i]).bits;
      const bool same = std::isnan(wide[i]) ? std::isnan(convert<float>(back[i])) : back[i].bits == alone;
      EXPECT(same, "%.9g is rounded to float16 %04x, not %04x", wide[i], back[i].bits, alone);
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
  test_float16();
  return finish("test_vectors");
}
