// Binary cross entropy of one probability p against a target t.
//
//   loss = -t log(p) - (1 - t) log(1 - p)                  logarithms no smaller than -100, so that the loss is finite
//   dloss/dp = (p - t) / (p (1 - p))                       denominator no smaller than 1e-12, likewise
//   dloss/dt = log(1 - p) - log(p)                         infinite where p is 0 or 1
//
// The limits are native torch's. Probabilities and targets outside [0, 1], NaN among them, are not in the domain.

#pragma once

#include "element.h"

namespace fusedloss::math {

struct Bce {
  template <class Acc>
  FUSEDLOSS_FN static bool in_domain(Acc value) {
    return int(value >= Acc(0)) & int(value <= Acc(1));
  }

  template <class Acc>
  FUSEDLOSS_FN static Acc at_least_minus_100(Acc value) {
    return value < Acc(-100) ? Acc(-100) : value;
  }

  // Near 1 an approximate logarithm has too few digits for half precision too: nothing is fast.
  template <bool kFast = false, class Acc>
  FUSEDLOSS_FN static LossAndSlope<Acc> evaluate(Acc p, Acc t, Acc) {
    const Acc least = Acc(1e-12f);  // native's constant is a float, in float64 too
    const Acc variance = (Acc(1) - p) * p;
    return {(t - Acc(1)) * at_least_minus_100(log1p(-p)) - t * at_least_minus_100(log(p)),
            fast_divide(p - t, variance < least ? least : variance)};
  }

  template <class Acc>
  FUSEDLOSS_FN static Acc target_grad(Acc p, Acc, Acc, Acc grad_loss) {
    return grad_loss * (log1p(-p) - log(p));
  }
};

}  // namespace fusedloss::math
