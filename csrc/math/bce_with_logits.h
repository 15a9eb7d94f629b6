// Binary cross entropy of one logit x against a target t, with a weight P on the positive side.
//
//   loss = (1 - t) softplus(x) + P t softplus(-x)          softplus(x) = log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))
//   dloss/dx = (1 - t) sigmoid(x) - P t sigmoid(-x)
//   dloss/dt = P softplus(-x) - softplus(x)
//
// No two large terms cancel: a confident right answer keeps its small loss and its small gradient.

#pragma once

#include "element.h"

namespace fusedloss::math {

struct BceWithLogits {
  template <class Acc>
  FUSEDLOSS_FN static bool in_domain(Acc) {
    return true;
  }

  // kFast: half precision will hide what fast functions lose. kWeighted: pos_weight may differ from 1. The exponential
  // is shared; where only one of the two results is used, the compiler drops what the other needs.
  template <class Acc, bool kFast = false, bool kWeighted = true>
  FUSEDLOSS_FN static LossAndSlope<Acc> evaluate(Acc x, Acc t, Acc pos_weight) {
    const Acc e = kFast ? fast_exp(-abs(x)) : exp_nonpositive(-abs(x));
    const Acc positive = pos_weight * t, negative = Acc(1) - t;

    const Acc tail = kFast ? fast_log1p_unit(e) : log1p_unit(e);
    // A sum rather than a comparison: -inf gives NaN, as in native torch, where -inf + inf meet.
    const Acc negative_part = max_ignoring_nan(-x, Acc(0));
    const Acc positive_part = x + negative_part;
    // Without a pos_weight the two sides weigh 1 together.
    const Acc loss = kWeighted ? negative * (positive_part + tail) + positive * (negative_part + tail)
                               : negative * positive_part + (positive * negative_part + tail);

    // The sigmoid's smaller side, which is known with full relative accuracy; the other is 1 - smaller.
    const Acc smaller = fast_divide(e, Acc(1) + e);
    const Acc both = kWeighted ? smaller * (negative + positive) : smaller;
    // What is taken off last is 0, or NaN where an infinite pos_weight makes native's gradient NaN.
    const Acc slope = select(x < Acc(0), both - positive, negative - both) - Acc(0) * pos_weight;
    return {loss, slope};
  }

  template <class Acc>
  FUSEDLOSS_FN static Acc target_grad(Acc x, Acc, Acc pos_weight, Acc grad_loss) {
    const Acc tail = log1p_unit(exp_nonpositive(-abs(x)));
    // Either way one of the two softplus is a tail alone, and nothing infinite is taken from what is infinite.
    const Acc weighted = x < Acc(0) ? pos_weight * (tail - x) - tail : (pos_weight - Acc(1)) * tail - x;
    return grad_loss * (pos_weight == Acc(1) ? Acc(0) - x : weighted);
  }
};

}  // namespace fusedloss::math
