// Negative log likelihood of one position: minus the log-probability of its target, times the target's weight.

#pragma once

#include "portable.h"

namespace fusedloss::math {

template <class Acc>
FUSEDLOSS_FN Acc nll_loss(Acc log_probability, Acc weight) {
  return -weight * log_probability;
}

template <class Acc>
FUSEDLOSS_FN Acc nll_grad(Acc grad_loss, Acc weight) {
  return -weight * grad_loss;
}

}  // namespace fusedloss::math
