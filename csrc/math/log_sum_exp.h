// The running statistics of a softmax row: its maximum and the sum of exp(x - maximum).
//
// A finished row is known by max and log(sum), kept apart: one rounded number max + log(sum) would lose the digits of
// log(sum) when logits are large. And log(sum) rather than sum: near 1 a rounded sum has lost the digits of sum - 1.
// A part of a row gives a value, parts are merged, and merging with an empty part changes nothing.

#pragma once

#include "portable.h"

namespace fusedloss::math {

// What to subtract from a part's entries before exp. A part of -inf only must give zeros, not exp(-inf + inf).
template <class Acc>
FUSEDLOSS_FN Acc finite_shift(Acc max) {
  return max == -kInfinity<Acc> ? Acc(0) : max;
}

// A part's sum, relative to a maximum that is no smaller than its own. Equal maxima need no factor, and two infinite
// ones would give exp(inf - inf).
template <class Acc, class Sum>
FUSEDLOSS_FN Sum rescale(Sum sum, Acc max, Acc new_max) {
  const Acc factor = exp_nonpositive(max - new_max);
  return sum * Sum(max == new_max ? Acc(1) : factor);
}

// Sum may be wider than Acc. Where one entry dominates, the sum is a little more than 1, and log(sum) is that little:
// digits that a narrow sum rounds off are most of it.
template <class Acc, class Sum = Acc>
struct LogSumExp {
  Acc max = -kInfinity<Acc>;
  Sum sum = Sum(0);  // of exp(x - max)

  // To a maximum that is no smaller.
  FUSEDLOSS_FN void raise(Acc larger_max) {
    sum = rescale(sum, max, larger_max);
    max = larger_max;
  }

  FUSEDLOSS_FN void merge(Acc other_max, Sum other_sum) {
    raise(max_ignoring_nan(other_max, max));
    sum += rescale(other_sum, other_max, max);
  }
};

// log(sum(exp(x))) from the row's statistics.
template <class Acc>
FUSEDLOSS_FN Acc log_sum_exp(Acc max, Acc log_sum) {
  return max == kInfinity<Acc> ? max : max + log_sum;
}

}  // namespace fusedloss::math
