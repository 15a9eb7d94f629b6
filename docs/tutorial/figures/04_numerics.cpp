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
