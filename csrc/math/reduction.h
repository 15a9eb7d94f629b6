// What reduction="mean" makes of a sum, and of the gradient that flows back through it.

#pragma once

#include "portable.h"

namespace fusedloss::math {

FUSEDLOSS_FN double reduced(bool is_mean, double sum, double divisor) { return is_mean ? sum / divisor : sum; }

// The mean over a denominator that the caller brings. Where nothing counts it is 0, whatever the denominator.
FUSEDLOSS_FN double reduced_over(double sum, double denominator) { return sum == 0 ? sum : sum / denominator; }

// The factor of a gradient. Null where nothing is divided.
FUSEDLOSS_FN double mean_scale(const double* divisor) { return divisor ? 1 / *divisor : 1; }

// A gradient that was written for another grad_output, times the quotient of the two. With keep_zeros, an exact zero
// stays one whatever flows back: where positions are ignored, their gradient is 0, and 0 * inf would make it NaN.
template <class Acc>
FUSEDLOSS_FN Acc rescaled(Acc grad, Acc factor, bool keep_zeros) {
  return keep_zeros ? zero_if(grad == Acc(0), grad * factor) : grad * factor;
}

}  // namespace fusedloss::math
