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
  FUSEDLOSS_FN static auto in_domain(Acc value) {
    return (Acc(0) <= value) & (value <= Acc(1));
  }

  template <class Acc>
  FUSEDLOSS_FN static Acc at_least_minus_100(Acc value) {
    return select(value < Acc(-100), Acc(-100), value);
  }

  template <class Acc>
  struct Logarithms {
    Acc of_p, of_rest;  // rest: 1 - p
  };

  // kFast: the smaller of p and 1 - p has a logarithm that an approximation is close to, and the larger one, near 1,
  // that of 1 less the smaller.
  template <bool kFast, class Acc>
  FUSEDLOSS_FN static Logarithms<Acc> logarithms(Acc p) {
    if constexpr (kFast) {
      const Acc rest = Acc(1) - p;
      const auto less = p < rest;
      const Acc smaller = select(less, p, rest), of_smaller = fast_log(smaller), of_larger = fast_log1m(smaller);
      return {select(less, of_smaller, of_larger), select(less, of_larger, of_smaller)};
    } else {
      return {log(p), log1p(-p)};
    }
  }

  // kFast: half precision will hide what fast functions lose.
  template <class Acc, bool kFast = false, bool kWeighted = true>
  FUSEDLOSS_FN static LossAndSlope<Acc> evaluate(Acc p, Acc t, Acc) {
    const Acc least = Acc(1e-12f);  // native's constant is a float, in float64 too
    const Acc variance = (Acc(1) - p) * p;
    const Logarithms<Acc> logs = logarithms<kFast>(p);
    return {(t - Acc(1)) * at_least_minus_100(logs.of_rest) - t * at_least_minus_100(logs.of_p),
            fast_divide(p - t, select(variance < least, least, variance))};
  }

  template <class Acc>
  FUSEDLOSS_FN static Acc target_grad(Acc p, Acc, Acc, Acc grad_loss) {
    return grad_loss * (log1p(-p) - log(p));
  }
};

}  // namespace fusedloss::math
