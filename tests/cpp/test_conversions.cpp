// Half precision to float and back: every value one way, and the roundings the other way.

#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "kernels/cpu/memory.h"

using namespace fusedloss::cpu;

namespace {

// IEEE 754 and bfloat16, from the definition: sign, exponent, fraction.
double value(std::uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = static_cast<double>(bits & ((1u << fraction_bits) - 1)) / (1 << fraction_bits);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? std::nan("") : sign * HUGE_VAL;
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias) : sign * std::ldexp(1 + fraction, exponent - bias);
}

template <class T>
void test_every_value(const char* name, int exponent_bits, int fraction_bits) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float result = convert<float>(T{static_cast<std::uint16_t>(bits)});
    const double truth = value(bits, exponent_bits, fraction_bits);
    const bool same = std::isnan(truth) ? std::isnan(result) : result == truth && std::signbit(result) == (bits >> 15);
    EXPECT(same, "%s %04x is %g, not %g", name, bits, truth, result);
    const T back = round_to<T>(result);
    EXPECT(std::isnan(truth) ? std::isnan(convert<float>(back)) : back.bits == bits, "%s %04x comes back as %04x", name,
           bits, back.bits);
  }
}

// The midpoint between two neighbours goes to the even one, and what is just off it to the nearer one.
template <class T>
void test_every_rounding(const char* name, std::uint32_t infinity) {
  for (std::uint32_t bits = 0; bits + 1 < infinity; ++bits) {
    const float low = convert<float>(T{static_cast<std::uint16_t>(bits)});
    const float high = convert<float>(T{static_cast<std::uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    const std::uint32_t even = bits + (bits & 1);
    EXPECT(round_to<T>(middle).bits == even, "%s: %.9g to even", name, middle);
    EXPECT(round_to<T>(std::nextafter(middle, low)).bits == bits, "%s: just below %.9g", name, middle);
    EXPECT(round_to<T>(std::nextafter(middle, high)).bits == bits + 1, "%s: just above %.9g", name, middle);
    EXPECT(round_to<T>(-middle).bits == (even | 0x8000), "%s: minus %.9g", name, middle);
  }
  EXPECT(round_to<T>(3e38f * 2).bits == infinity, "%s: overflow", name);
}

}  // namespace

int main() {
  test_every_value<Float16>("float16", 5, 10);
  test_every_value<BFloat16>("bfloat16", 8, 7);
  test_every_rounding<Float16>("float16", 0x7c00);
  test_every_rounding<BFloat16>("bfloat16", 0x7f80);
  return finish("conversions");
}
