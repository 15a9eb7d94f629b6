// Cross entropy of one row of logits x against a target that puts the mass a_c on class c.
//
//   A      = sum of a_c
//   p_c    = exp(x_c - max) / sum                          the softmax, from the row's statistics
//   loss   = sum over c of a_c (log(sum) - (x_c - max)) + z lse^2
//   dloss/dx_c = p_c (A + 2 z lse) - a_c
//   dloss/da_c = log(sum) - (x_c - max)
//
// A class index t, probabilities q, class weights w and label smoothing s are all ways to spell the masses:
//
//   index          a_c = (1 - s) w_t [c = t] + (s / C) w_c
//   probabilities  a_c = w_c ((1 - s) q_c + s / C)
//
// Everything is relative to the row's maximum, which is subtracted first: the differences are exact where it matters,
// and an underflowed exponential never meets a logarithm. Sources: Szegedy et al., arXiv:1512.00567 (smoothing);
// Chowdhery et al., arXiv:2204.02311 (z loss); Gemma 2, arXiv:2408.00118 (soft cap).

#pragma once

#include "log_sum_exp.h"

namespace fusedloss::math {

template <class Acc>
struct Smoothing {
  Acc keep;    // 1 - s
  Acc spread;  // s / C
};

template <class Acc>
FUSEDLOSS_FN Acc probability_mass(Smoothing<Acc> smoothing, Acc probability, Acc weight) {
  return weight * (smoothing.keep * probability + smoothing.spread);
}

// What one class adds to the loss: its mass times -log p_c. shifted: x_c - max.
template <class Acc>
FUSEDLOSS_FN Acc entry_loss(Acc shifted, Acc log_sum, Acc mass) {
  return mass * (log_sum - shifted);
}

// The same less mass * log_sum, which a row adds once for all its classes. The largest logit adds nothing, with an
// infinite mass too.
template <class Acc>
FUSEDLOSS_FN Acc entry_loss_at_max(Acc shifted, Acc mass) {
  return zero_if(shifted == Acc(0), -mass * shifted);
}

// Without a z loss the term is left out: 0 * inf would turn an infinite lse into NaN.
template <class Acc>
FUSEDLOSS_FN Acc z_term(Acc lse, Acc z_loss) {
  return z_loss == Acc(0) ? Acc(0) : z_loss * lse * lse;
}

// The factor of p_c in the gradient: what flows into the row's normaliser from the loss and from the returned lse.
template <class Acc>
FUSEDLOSS_FN Acc normaliser_grad(Acc grad_loss, Acc grad_lse, Acc mass, Acc lse, Acc z_loss) {
  return grad_loss * (z_loss == Acc(0) ? mass : mass + Acc(2) * z_loss * lse) + grad_lse;
}

// The gradient from e_c = exp(x_c - shift), where softmax_grad = normaliser_grad / (sum of e_c), and target_grad =
// grad_loss * a_c; formed and subtracted in the accumulate type.
template <class Acc>
FUSEDLOSS_FN Acc logit_grad(Acc e, Acc softmax_grad, Acc target_grad) {
  return e * softmax_grad - target_grad;
}

// The gradient to a probability q_c, which enters through its mass.
template <class Acc>
FUSEDLOSS_FN Acc probability_grad(Acc shifted, Acc log_sum, Acc grad_loss, Acc keep, Acc weight) {
  return grad_loss * keep * weight * (log_sum - shifted);
}

template <class Acc>
struct SoftCap {
  Acc value;
  Acc slope;  // d value / dx
};

template <class Acc>
FUSEDLOSS_FN SoftCap<Acc> soft_cap(Acc x, Acc cap) {
  const Acc t = tanh(x / cap);
  return {cap * t, (Acc(1) - t) * (Acc(1) + t)};
}

}  // namespace fusedloss::math
