// The verdict on one result: near the truth, on both backends, or as special as the CPU's.

#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "tensor.h"

namespace check {

inline bool same_kind(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::isfinite(a) ? std::isfinite(b) : a == b;
}

// A number worked out in at least double precision, and how far from it a kernel's rounding may lead.
struct Truth {
  double value = 0;
  double tolerance = 0;
};

// The largest error that was met, as a part of its tolerance.
inline double& worst_error() {
  static double value = 0;
  return value;
}

inline void judge(const char* pass, const Tensor& tensor, std::int64_t k, Truth truth) {
  const Dtype dtype = tensor.dtype();
  const double tolerance = truth.tolerance + rounding(dtype, truth.value);
  const double device = tensor.of_device(k), cpu = tensor.of_cpu(k);
  if (!std::isfinite(truth.value)) {
    EXPECT(same_kind(device, cpu), "%s, %s %ld: %.9g, where the CPU has %.9g", pass, tensor.name().c_str(), long(k),
           device, cpu);
    return;
  }
  EXPECT(std::fabs(device - truth.value) <= tolerance,
         "%s, %s %ld: %.9g, truth %.9g (the CPU has %.9g), tolerance %.2g", pass, tensor.name().c_str(), long(k),
         device, truth.value, cpu, tolerance);
  EXPECT(std::fabs(cpu - truth.value) <= tolerance, "%s, %s %ld: the CPU has %.9g, truth %.9g, tolerance %.2g", pass,
         tensor.name().c_str(), long(k), cpu, truth.value, tolerance);
  if (tolerance > 0) worst_error() = std::max(worst_error(), std::fabs(device - truth.value) / tolerance);
}

inline void judge_all(const char* pass, const Tensor& tensor, const std::vector<Truth>& truths) {
  for (std::int64_t k = 0; k < tensor.size(); ++k) judge(pass, tensor, k, truths[k]);
}

}  // namespace check
