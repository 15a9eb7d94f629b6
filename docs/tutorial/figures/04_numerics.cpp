// The library's own elementary functions over arrays, for 04_numerics.py to judge.

#include "../../../csrc/math/portable.h"

namespace math = fusedloss::math;

#define OVER_ARRAYS(name, function)                                               \
  extern "C" void name##_float(const float* x, float* y, std::int64_t count) {    \
    for (std::int64_t i = 0; i < count; ++i) y[i] = function(x[i]);               \
  }                                                                               \
  extern "C" void name##_double(const double* x, double* y, std::int64_t count) { \
    for (std::int64_t i = 0; i < count; ++i) y[i] = function(x[i]);               \
  }

OVER_ARRAYS(exp_nonpositive, math::exp_nonpositive)
OVER_ARRAYS(log, math::log)
OVER_ARRAYS(log1p_unit, math::log1p_unit)
OVER_ARRAYS(libm_exp, std::exp)

// The form with a table, a vector at a time.
#if defined(__x86_64__) && !defined(__clang__)
#include "../../../csrc/kernels/cpu/std_headers.h"

#pragma GCC target("avx2,fma,f16c")
#define FUSEDLOSS_LANES 8
#include "../../../csrc/kernels/cpu/vector.h"

using fusedloss::cpu::FloatVector;

extern "C" void exp_nonpositive_table_float(const float* x, float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += FloatVector::kLanes) {
    i = i + FloatVector::kLanes <= count ? i : count - FloatVector::kLanes;
    exp_nonpositive(FloatVector::load(x + i)).store(y + i);
  }
}
#endif
