// Cross entropy of one row of logits x against a target that puts the mass a_c on class c.
//
//   A      = sum of a_c
//   p_c    = exp(x_c - max) / sum                          the softmax, from the row's statistics
//   loss   = v (sum over c of a_c (log(sum) - (x_c - max)) + z lse^2)
//   dloss/dx_c = v (p_c (A + 2 z lse) - a_c)
//   dloss/da_c = v (log(sum) - (x_c - max))
//
// with the row's own weight v. Beside the loss a row has an entropy. It is formed of the gap max - x, whose mean over
// the softmax is D = sum of p_c (max - x_c):
//
//   entropy = log(sum) + D
//   dentropy/dx_c = p_c ((max - x_c) - D)
//
// Both terms of the entropy are 0 or more, so that nothing cancels: in a row where one class has almost all of the
// probability, lse - sum of p_c x_c would be the difference of two numbers that agree in all their digits.
//
// A class index t, probabilities q, class weights w and label smoothing s are all ways to spell the masses:
//
//   index          a_c = (1 - s) w_t [c = t] + (s / C) w_c
//   probabilities  a_c = w_c ((1 - s) q_c + s / C)
//
// A row passes through four phases, which have these names on every backend:
//
//   statistics   what the entries of a part of the row add up to: RowStatistics
//   merge        the statistics of two parts are those of both together
//   finish       row_loss: the loss of a row, from its statistics and its target
//   gradient     row_gradient: what all entries of a row share in their gradients, and logit_grad, an entry's own
//
// Everything is relative to the row's maximum, which is subtracted first: the differences are exact where it matters,
// and an underflowed exponential never meets a logarithm. Sources: Szegedy et al., arXiv:1512.00567 (smoothing);
// Chowdhery et al., arXiv:2204.02311 (z loss); Gemma 2, arXiv:2408.00118 (soft cap).

#pragma once

#include <array>
#include <utility>

#include "log_sum_exp.h"

namespace fusedloss::math {

// What a caller may ask of the formulas above.
struct RowOptions {
  double label_smoothing = 0;  // s
  double z_loss = 0;           // z
  double logit_scale = 1;      // the logits are multiplied by it first
  double logit_softcap = 0;    // and capped then; 0: they are not

  // Whether the softmax sees other logits than there are.
  FUSEDLOSS_FN bool transforms() const { return logit_scale != 1 || logit_softcap != 0; }

  // All of them by name, for those who only hand them on: schemas, autograd, Triton.
  static constexpr auto named() {
    return std::array{
        std::pair{"label_smoothing", &RowOptions::label_smoothing},
        std::pair{"z_loss", &RowOptions::z_loss},
        std::pair{"logit_scale", &RowOptions::logit_scale},
        std::pair{"logit_softcap", &RowOptions::logit_softcap},
    };
  }
};

// What the options make of the formulas: the same for all rows of a launch.
template <class Acc>
struct RowProblem {
  Acc keep = Acc(1);         // 1 - s, of the mass on the target
  Acc spread = Acc(0);       // s / C, the mass on each class
  Acc spread_mass = Acc(0);  // and on all of them together, times their weights
  Acc z_loss = Acc(0);
  bool probabilities = false;

  // Whether every class has mass, and not the target alone.
  FUSEDLOSS_FN bool dense() const { return int(probabilities) | int(spread != Acc(0)); }
  [[gnu::always_inline]] bool operator==(const RowProblem&) const = default;  // on the host alone
};

// Where the target alone has mass.
template <class Acc>
FUSEDLOSS_FN RowProblem<Acc> index_problem(const RowOptions& options) {
  return {.z_loss = Acc(options.z_loss)};
}

// weight_sum: of the class weights, or the number of classes.
template <class Acc>
FUSEDLOSS_FN RowProblem<Acc> row_problem(const RowOptions& options, bool probabilities, double classes,
                                         double weight_sum) {
  const double s = options.label_smoothing;
  RowProblem<Acc> problem = index_problem<Acc>(options);
  problem.keep = Acc(1 - s);
  problem.spread = s == 0 ? Acc(0) : Acc(s / classes);
  if (!probabilities && problem.spread != Acc(0)) problem.spread_mass = Acc(double(problem.spread) * weight_sum);
  problem.probabilities = probabilities;
  return problem;
}

// The mass that a class index puts on its class alone.
template <class Acc>
FUSEDLOSS_FN Acc index_mass(const RowProblem<Acc>& problem, Acc weight) {
  return problem.keep * weight;
}

// All masses of a row together. of_probabilities: their sum, where the target is probabilities.
template <class Acc>
FUSEDLOSS_FN Acc row_mass(const RowProblem<Acc>& problem, Acc target_mass, Acc of_probabilities) {
  return problem.probabilities ? of_probabilities : target_mass + problem.spread_mass;
}

template <class Acc>
FUSEDLOSS_FN Acc probability_mass(const RowProblem<Acc>& problem, Acc probability, Acc weight) {
  return weight * (problem.keep * probability + problem.spread);
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

// --- Statistics, and their merge ---

// An entry's exponential times its gap: 0 where the exponential is, and the gap may be infinite.
template <class Acc>
FUSEDLOSS_FN Acc times_gap(Acc e, Acc shifted) {
  return -(e * zero_if(shifted < Acc(Format<Acc>::exp_normal), shifted));
}

// What the entries of a part of a row add up to: the softmax's statistics; and in the rich kind, for whom they are
// wanted, the sum of exp(x - max) (max - x), and where every class has mass the sum of mass (max - x) and the sum of
// the masses. The masses are class weights, which problem.spread multiplies once for the whole row; or those of
// probabilities, as they are.
//
// Sum may be wider than Acc. The masses are float64: the gradient is p times their sum, minus masses that add up to it,
// and what the sum has rounded off would remain.
template <class Acc, bool kRich, class Sum = Acc>
struct RowStatistics;

template <class Acc, class Sum>
struct RowStatistics<Acc, false, Sum> : LogSumExp<Acc, Sum> {
  FUSEDLOSS_FN void merge(const RowStatistics& other) { LogSumExp<Acc, Sum>::merge(other.max, other.sum); }
};

template <class Acc, class Sum>
struct RowStatistics<Acc, true, Sum> : LogSumExp<Acc, Sum> {
  Sum gap = Sum(0);
  Sum dense_loss = Sum(0);
  double mass = 0;

  FUSEDLOSS_FN void raise(Acc larger_max) {
    const Acc before = this->max;
    const Sum apart = Sum(finite_shift(larger_max)) - Sum(finite_shift(before));
    gap = rescale(gap + apart * this->sum, before, larger_max);
    dense_loss += entry_loss_at_max(-apart, Sum(mass));
    LogSumExp<Acc, Sum>::raise(larger_max);
  }

  FUSEDLOSS_FN void merge(RowStatistics other) {
    raise(max_ignoring_nan(other.max, this->max));
    other.raise(this->max);
    this->sum += other.sum;
    gap += other.gap;
    dense_loss += other.dense_loss;
    mass += other.mass;
  }
};

// The statistics of a whole row.
template <class Acc>
struct FinishedRow {
  Acc max;
  Acc log_sum;
  Acc dense_loss;  // 0 where the target alone has mass
  Acc mass;        // of probabilities
  Acc gap;         // D, where the entropy is wanted

  FUSEDLOSS_FN Acc lse() const { return log_sum_exp(max, log_sum); }
  FUSEDLOSS_FN Acc entropy() const { return log_sum + gap; }
};

// --- Finish ---

// What a target says of its row.
template <class Acc>
struct RowTarget {
  bool counts;          // else, and without classes, the row has no loss, and no gradient but through its lse
  Acc mass;             // on the target class alone: index_mass, or 0 where there is no such class
  Acc shifted;          // the target's logit minus the row's maximum; finite where there is no target class
  Acc weight = Acc(1);  // v, of the row
};

// Without a z loss the term is left out: 0 * inf would turn an infinite lse into NaN.
template <class Acc>
FUSEDLOSS_FN Acc z_term(Acc lse, Acc z_loss) {
  return z_loss == Acc(0) ? Acc(0) : z_loss * lse * lse;
}

template <class Acc>
FUSEDLOSS_FN Acc row_loss(const RowProblem<Acc>& problem, const FinishedRow<Acc>& row, const RowTarget<Acc>& target) {
  const Acc on_target = entry_loss(target.shifted, row.log_sum, target.mass);
  const Acc scale = problem.probabilities ? Acc(1) : problem.spread;
  const Acc mass = problem.probabilities ? row.mass : problem.spread_mass;
  const Acc on_all = problem.dense() ? scale * row.dense_loss + mass * row.log_sum : Acc(0);
  const Acc loss = (on_target + on_all) + z_term(row.lse(), problem.z_loss);
  return zero_if(!target.counts, target.weight * loss);
}

// --- Gradient ---

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

// What the entries of a row share in their gradients.
template <class Acc>
struct RowGradient {
  Acc factor;     // of the softmax: divided by the sum of the exponentials, of exp(x - max)
  Acc on_target;  // the target class's mass times grad_loss
  Acc on_all;     // what the masses that all classes have are multiplied by
  Acc on_gap;     // what an entry's gap adds to the factor; divided by the sum too

  // Of logits that all have this slope.
  FUSEDLOSS_FN RowGradient through(Acc slope) const {
    return {factor * slope, on_target * slope, on_all * slope, on_gap * slope};
  }
};

// grad_loss and grad_lse: what flows into the row's loss, times the row's weight, and into its lse. mass: all of the
// row's, row_mass; lse is needed by a z loss alone.
template <class Acc>
FUSEDLOSS_FN RowGradient<Acc> row_gradient(const RowProblem<Acc>& problem, const RowTarget<Acc>& target, Acc mass,
                                           Acc lse, Acc grad_loss, Acc grad_lse) {
  const Acc g = zero_if(!target.counts, grad_loss);
  const Acc factor = normaliser_grad(g, grad_lse, zero_if(!target.counts, mass), lse, problem.z_loss);
  return {factor, g * target.mass, problem.probabilities ? g : g * problem.spread, Acc(0)};
}

// Adds what flows into the row's entropy. gap: D.
template <class Acc>
FUSEDLOSS_FN void add_entropy_grad(RowGradient<Acc>& row, Acc grad_entropy, Acc gap) {
  row.factor -= grad_entropy * gap;
  row.on_gap += grad_entropy;
}

// An entry's exponential times its factor, where the entropy gives a gradient.
template <class Acc>
FUSEDLOSS_FN Acc times_factor(Acc e, Acc factor, Acc on_gap, Acc shifted) {
  return e * factor + on_gap * times_gap(e, shifted);
}

// x divided by the row's sum, from the logarithm that forward has saved. It is 0 or more, since the largest entry adds
// 1 to the sum; but all logits -inf, or an infinite one, give -inf and NaN, and the gradient is NaN.
template <class Acc>
FUSEDLOSS_FN Acc over_sum(Acc x, Acc log_sum) {
  return log_sum >= Acc(0) ? times_exp(x, -log_sum) : log_sum - log_sum;
}

// The gradient to a probability q_c, which enters through its mass.
template <class Acc>
FUSEDLOSS_FN Acc probability_grad(Acc shifted, Acc log_sum, Acc grad_loss, Acc keep, Acc weight) {
  return grad_loss * keep * weight * (log_sum - shifted);
}

// A logit as the softmax sees it.
template <class Acc>
struct SeenLogit {
  Acc value;
  Acc slope;  // d value / dx
};

template <class Acc>
FUSEDLOSS_FN SeenLogit<Acc> soft_cap(Acc x, Acc cap) {
  const Acc t = tanh(x / cap);
  return {product(cap, t), (Acc(1) - t) * (Acc(1) + t)};
}

// The value is rounded before anything is subtracted from it: from a maximum that is rounded, a product that is not
// would differ where both are the same logit's.
template <class Acc>
FUSEDLOSS_FN SeenLogit<Acc> seen_logit(Acc x, Acc scale, Acc cap) {
  const Acc scaled = product(scale, x);
  if (cap == Acc(0)) return {scaled, scale};
  const SeenLogit<Acc> capped = soft_cap(scaled, cap);
  return {capped.value, scale * capped.slope};
}

}  // namespace fusedloss::math
