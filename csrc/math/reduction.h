// What reduction="mean" makes of a sum, and of the gradient that flows back through it.

#pragma once

#include "portable.h"

namespace fusedloss::math {

FUSEDLOSS_FN double reduced(bool is_mean, double sum, double divisor) { return is_mean ? sum / divisor : sum; }

// The factor of a gradient. Null where nothing is divided.
FUSEDLOSS_FN double mean_scale(const double* divisor) { return divisor ? 1 / *divisor : 1; }

}  // namespace fusedloss::math
