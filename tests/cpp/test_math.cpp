// The elementary functions over their whole range, in units in the last place, and the formulas at the edges.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "math/bce.h"
#include "math/bce_with_logits.h"
#include "math/cross_entropy.h"

using namespace fusedloss::math;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The error of a float result in units of the last place of the true value, denormals included.
double ulps(float result, double truth) {
  if (std::isnan(truth)) return std::isnan(result) ? 0 : 1e9;
  if (std::isinf(static_cast<float>(truth))) return result == static_cast<float>(truth) ? 0 : 1e9;
  int exponent;
  std::frexp(truth, &exponent);
  return std::fabs(result - truth) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

double ulps(double result, long double truth) {
  int exponent;
  std::frexp(truth, &exponent);
  return static_cast<double>(std::fabs(result - truth) / std::ldexp(1.0L, std::max(exponent - 53, -1074)));
}

// Every 61st float: 70 million, all exponents and both signs, NaN and infinities among them.
template <class Ours, class Truth>
void sweep(const char* name, double bound, float low, float high, Ours ours, Truth truth) {
  double worst = 0;
  for (std::uint64_t bits = 0; bits <= 0xffffffffu; bits += 61) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if (x < low || x > high) continue;
    const double error = ulps(ours(x), truth(static_cast<double>(x)));
    EXPECT(error <= bound, "%s(%.9g) is %.9g, off by %.3g units", name, x, ours(x), error);
    worst = std::max(worst, error);
  }
  std::printf("%s: at most %.3f units in the last place\n", name, worst);
}

template <class Ours, class Truth>
void sample(const char* name, double bound, double low, double high, Ours ours, Truth truth) {
  const int count = 400000;
  for (int i = 0; i <= count; ++i) {
    const double x = low + (high - low) * i / count;
    const double error = ulps(ours(x), truth(static_cast<long double>(x)));
    EXPECT(error <= bound, "%s(%.17g) is %.17g, off by %.3g units", name, x, ours(x), error);
  }
}

void test_float() {
  // Denormal results are 0: within 2^-126 of the truth, the smallest normal number.
  const auto normal = [](double x) { return x < -87.33654 ? 0 : std::exp(x); };
  sweep("exp_nonpositive", 1.25, -kInf, 0, [](float x) { return exp_nonpositive(x); }, normal);
  sweep("log", 0.85, -kInf, kInf, [](float x) { return log(x); }, [](double x) { return std::log(x); });
  sweep("log1p_unit", 1.9, 0, 1, [](float x) { return log1p_unit(x); }, [](double x) { return std::log1p(x); });
  sweep("log1p", 1.5, -1, 1, [](float x) { return log1p(x); }, [](double x) { return std::log1p(x); });
  sweep("tanh", 2.6, -kInf, kInf, [](float x) { return tanh(x); }, [](double x) { return std::tanh(x); });
}

void test_double() {
  const auto to_exp = [](double x) { return exp_nonpositive(x); };
  const auto true_exp = [](long double x) { return std::exp(x); };
  sample("exp_nonpositive", 1.25, -708, 0, to_exp, true_exp);
  sample("exp_nonpositive", 1.25, -1, 0, to_exp, true_exp);
  EXPECT(exp_nonpositive(-1e300) == 0 && exp_nonpositive(-HUGE_VAL) == 0, "the end of exp_nonpositive");
  sample("log", 1, 1e-3, 4, [](double x) { return log(x); }, [](long double x) { return std::log(x); });
  sample("log1p", 2, -0.999, 1, [](double x) { return log1p(x); }, [](long double x) { return std::log1p(x); });
  sample("log1p_unit", 2, 0, 1, [](double x) { return log1p_unit(x); }, [](long double x) { return std::log1p(x); });
  sample("tanh", 3, -20, 20, [](double x) { return tanh(x); }, [](long double x) { return std::tanh(x); });
  EXPECT(log(5e-324) == std::log(5e-324), "log of the smallest denormal: %.17g", log(5e-324));
}

void test_log_sum_exp() {
  LogSumExp<float, double> row;
  row.merge(-kInf, 0);
  EXPECT(row.max == -kInf && row.sum == 0, "a part of -inf is as good as none");
  row.merge(3, 2);
  row.merge(-kInf, 0);
  EXPECT(row.max == 3 && row.sum == 2, "max %g, sum %g", row.max, row.sum);
  row.merge(4, 1);
  EXPECT(row.max == 4 && std::fabs(row.sum - (2 * std::exp(-1.0) + 1)) < 1e-7, "sum %.9g", row.sum);
  EXPECT(log_sum_exp(kInf, std::nanf("")) == kInf, "an infinite maximum is the result");
}

// exp(-104) is 0 in float32; the loss there is not.
void test_confident_predictions() {
  for (const double x : {-200.0, -104.0, -30.0, 30.0, 104.0, 200.0}) {
    const float loss = BceWithLogits::evaluate<float>(float(x), x > 0 ? 0 : 1, 1).loss;
    EXPECT(ulps(loss, std::fabs(x) + std::log1p(std::exp(-std::fabs(x)))) <= 1, "loss at %g: %.9g", x, loss);
    const float small = BceWithLogits::evaluate<float>(float(x), x > 0 ? 1 : 0, 1).slope;
    const double truth = (x > 0 ? -1 : 1) / (1 + std::exp(std::fabs(x)));
    EXPECT(ulps(small, truth) <= 2, "gradient at %g: %.9g, truth %.9g", x, small, truth);
  }
}

void test_bce_limits() {
  EXPECT(Bce::evaluate<float>(0, 1, 1).loss == 100 && Bce::evaluate<float>(1, 0, 1).loss == 100,
         "log is at least -100");
  EXPECT(Bce::evaluate<float>(0, 1, 1).slope == -1 / 1e-12f, "p (1 - p) is at least 1e-12");
  EXPECT(!Bce::in_domain(std::nanf("")) && !Bce::in_domain(1.5f) && Bce::in_domain(0.0f), "the domain is [0, 1]");
}

}  // namespace

int main() {
  test_float();
  test_double();
  test_log_sum_exp();
  test_confident_predictions();
  test_bce_limits();
  return finish("math");
}
