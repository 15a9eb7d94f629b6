// The formulas of csrc/math as a library of C functions over arrays, for tests that compare other backends' twins with
// them (tests/test_triton_math.py).

#include <array>
#include <cstdint>
#include <cstring>

#include "math/bce.h"
#include "math/bce_with_logits.h"
#include "math/cross_entropy.h"
#include "math/nll.h"
#include "math/reduction.h"

namespace {

using namespace fusedloss::math;

// One element: arguments in, results out.
template <class Acc>
struct Row {
  const char* name;
  void (*evaluate)(const Acc* x, Acc* y);
};

template <class Acc, std::size_t kCount>
void store(Acc* y, const Acc (&results)[kCount]) {
  for (std::size_t i = 0; i < kCount; ++i) y[i] = results[i];
}

// What the target of a row is. Other backends choose it when they are compiled.
enum class Target { index, smoothed, probabilities };

template <class Acc, Target kTarget>
void problem_of(const Acc* x, Acc* y) {
  const double smoothing = kTarget == Target::index ? 0 : x[0];
  const RowProblem<Acc> p =
      row_problem<Acc>({.label_smoothing = smoothing, .z_loss = x[1]}, kTarget == Target::probabilities, x[2], x[3]);
  store(y, {p.keep, p.spread, p.spread_mass, p.z_loss});
}

template <class Acc, bool kRich>
void merged(const Acc* x, Acc* y) {
  RowStatistics<Acc, kRich> parts[2];
  for (auto& part : parts) {
    part.max = *x++;
    part.sum = *x++;
    if constexpr (kRich) {
      part.gap = *x++;
      part.dense_loss = *x++;
      part.mass = *x++;
    }
  }
  parts[0].merge(parts[1]);
  if constexpr (kRich) {
    store(y, {parts[0].max, parts[0].sum, parts[0].gap, parts[0].dense_loss, Acc(parts[0].mass)});
  } else {
    store(y, {parts[0].max, parts[0].sum});
  }
}

template <class Acc, Target kTarget>
RowProblem<Acc> problem_from(const Acc* x) {
  return {Acc(1), kTarget == Target::index ? Acc(0) : x[0], kTarget == Target::smoothed ? x[1] : Acc(0), x[2],
          kTarget == Target::probabilities};
}

template <class Acc, Target kTarget>
void loss_of(const Acc* x, Acc* y) {
  const FinishedRow<Acc> row{x[3], x[4], x[5], x[6], Acc(0)};
  const RowTarget<Acc> target{x[7] > Acc(0.5), x[8], x[9], x[10]};
  y[0] = row_loss(problem_from<Acc, kTarget>(x), row, target);
}

template <class Acc, Target kTarget>
void gradient_of(const Acc* x, Acc* y) {
  const RowProblem<Acc> problem = problem_from<Acc, kTarget>(x);
  const RowTarget<Acc> target{x[3] > Acc(0.5), x[4], Acc(0)};
  const Acc mass = row_mass(problem, target.mass, x[5]);
  const RowGradient<Acc> gradient = row_gradient(problem, target, mass, x[6], x[7], x[8]);
  store(y, {gradient.factor, gradient.on_target, gradient.on_all, gradient.on_gap});
}

template <class Acc, bool kScaled, bool kCapped>
void seen(const Acc* x, Acc* y) {
  const SeenLogit<Acc> logit = seen_logit(x[0], kScaled ? x[1] : Acc(1), kCapped ? x[2] : Acc(0));
  store(y, {logit.value, logit.slope});
}

template <class Acc>
constexpr std::array kTable{
    Row<Acc>{"max_ignoring_nan", [](const Acc* x, Acc* y) { y[0] = max_ignoring_nan(x[0], x[1]); }},
    Row<Acc>{"clamp", [](const Acc* x, Acc* y) { y[0] = clamp(x[0], x[1], x[2]); }},
    Row<Acc>{"product", [](const Acc* x, Acc* y) { y[0] = product(x[0], x[1]); }},
    Row<Acc>{"fast_divide", [](const Acc* x, Acc* y) { y[0] = fast_divide(x[0], x[1]); }},
    Row<Acc>{"exp_nonpositive", [](const Acc* x, Acc* y) { y[0] = exp_nonpositive(x[0]); }},
    Row<Acc>{"fast_exp", [](const Acc* x, Acc* y) { y[0] = fast_exp(x[0]); }},
    Row<Acc>{"times_exp", [](const Acc* x, Acc* y) { y[0] = times_exp(x[0], x[1]); }},
    Row<Acc>{"tanh", [](const Acc* x, Acc* y) { y[0] = fusedloss::math::tanh(x[0]); }},
    Row<Acc>{"log1p_unit", [](const Acc* x, Acc* y) { y[0] = log1p_unit(x[0]); }},
    Row<Acc>{"log1p", [](const Acc* x, Acc* y) { y[0] = fusedloss::math::log1p(x[0]); }},
    Row<Acc>{"reduced_over", [](const Acc* x, Acc* y) { y[0] = Acc(reduced_over(x[0], x[1])); }},
    Row<Acc>{"rescaled", [](const Acc* x, Acc* y) { y[0] = rescaled(x[0], x[1], true); }},
    Row<Acc>{"finite_shift", [](const Acc* x, Acc* y) { y[0] = finite_shift(x[0]); }},
    Row<Acc>{"rescale", [](const Acc* x, Acc* y) { y[0] = rescale(x[0], x[1], x[2]); }},
    Row<Acc>{"log_sum_exp", [](const Acc* x, Acc* y) { y[0] = log_sum_exp(x[0], x[1]); }},
    Row<Acc>{"row_problem of index", problem_of<Acc, Target::index>},
    Row<Acc>{"row_problem of smoothed", problem_of<Acc, Target::smoothed>},
    Row<Acc>{"row_problem of probabilities", problem_of<Acc, Target::probabilities>},
    Row<Acc>{"index_mass", [](const Acc* x, Acc* y) { y[0] = index_mass(RowProblem<Acc>{.keep = x[0]}, x[1]); }},
    Row<Acc>{"probability_mass",
             [](const Acc* x, Acc* y) {
               y[0] = probability_mass(RowProblem<Acc>{.keep = x[0], .spread = x[1]}, x[2], x[3]);
             }},
    Row<Acc>{"entry_loss", [](const Acc* x, Acc* y) { y[0] = entry_loss(x[0], x[1], x[2]); }},
    Row<Acc>{"entry_loss_at_max", [](const Acc* x, Acc* y) { y[0] = entry_loss_at_max(x[0], x[1]); }},
    Row<Acc>{"times_gap", [](const Acc* x, Acc* y) { y[0] = times_gap(x[0], x[1]); }},
    Row<Acc>{"merge of index", merged<Acc, false>},
    Row<Acc>{"merge of smoothed", merged<Acc, true>},
    Row<Acc>{"row_lse", [](const Acc* x, Acc* y) { y[0] = FinishedRow<Acc>{.max = x[0], .log_sum = x[1]}.lse(); }},
    Row<Acc>{
        "row_entropy",
        [](const Acc* x, Acc* y) { y[0] = FinishedRow<Acc>{.max = Acc(0), .log_sum = x[0], .gap = x[1]}.entropy(); }},
    Row<Acc>{"row_loss of index", loss_of<Acc, Target::index>},
    Row<Acc>{"row_loss of smoothed", loss_of<Acc, Target::smoothed>},
    Row<Acc>{"row_loss of probabilities", loss_of<Acc, Target::probabilities>},
    Row<Acc>{"row_gradient of index", gradient_of<Acc, Target::index>},
    Row<Acc>{"row_gradient of smoothed", gradient_of<Acc, Target::smoothed>},
    Row<Acc>{"row_gradient of probabilities", gradient_of<Acc, Target::probabilities>},
    Row<Acc>{"gradient_through",
             [](const Acc* x, Acc* y) {
               const RowGradient<Acc> gradient = RowGradient<Acc>{x[0], x[1], x[2], x[3]}.through(x[4]);
               store(y, {gradient.factor, gradient.on_target, gradient.on_all, gradient.on_gap});
             }},
    Row<Acc>{"add_entropy_grad",
             [](const Acc* x, Acc* y) {
               RowGradient<Acc> gradient{x[0], x[1], x[2], x[3]};
               add_entropy_grad(gradient, x[4], x[5]);
               store(y, {gradient.factor, gradient.on_target, gradient.on_all, gradient.on_gap});
             }},
    Row<Acc>{"times_factor", [](const Acc* x, Acc* y) { y[0] = times_factor(x[0], x[1], x[2], x[3]); }},
    Row<Acc>{"over_sum", [](const Acc* x, Acc* y) { y[0] = over_sum(x[0], x[1]); }},
    Row<Acc>{"z_term", [](const Acc* x, Acc* y) { y[0] = z_term(x[0], x[1]); }},
    Row<Acc>{"normaliser_grad", [](const Acc* x, Acc* y) { y[0] = normaliser_grad(x[0], x[1], x[2], x[3], x[4]); }},
    Row<Acc>{"logit_grad", [](const Acc* x, Acc* y) { y[0] = logit_grad(x[0], x[1], x[2]); }},
    Row<Acc>{"probability_grad", [](const Acc* x, Acc* y) { y[0] = probability_grad(x[0], x[1], x[2], x[3], x[4]); }},
    Row<Acc>{"soft_cap",
             [](const Acc* x, Acc* y) {
               const SeenLogit<Acc> capped = soft_cap(x[0], x[1]);
               y[0] = capped.value;
               y[1] = capped.slope;
             }},
    Row<Acc>{"seen_logit of scaled", seen<Acc, true, false>},
    Row<Acc>{"seen_logit of capped", seen<Acc, false, true>},
    Row<Acc>{"seen_logit of scaled and capped", seen<Acc, true, true>},
    Row<Acc>{"nll_loss", [](const Acc* x, Acc* y) { y[0] = nll_loss(x[0], x[1]); }},
    Row<Acc>{"nll_grad", [](const Acc* x, Acc* y) { y[0] = nll_grad(x[0], x[1]); }},
    Row<Acc>{"bce_with_logits_evaluate",
             [](const Acc* x, Acc* y) {
               const LossAndSlope<Acc> result = BceWithLogits::evaluate(x[0], x[1], x[2]);
               y[0] = result.loss;
               y[1] = result.slope;
             }},
    Row<Acc>{"bce_with_logits_target_grad",
             [](const Acc* x, Acc* y) { y[0] = BceWithLogits::target_grad(x[0], x[1], x[2], x[3]); }},
    Row<Acc>{"bce_evaluate",
             [](const Acc* x, Acc* y) {
               const LossAndSlope<Acc> result = Bce::evaluate(x[0], x[1], x[2]);
               y[0] = result.loss;
               y[1] = result.slope;
             }},
    Row<Acc>{"bce_target_grad", [](const Acc* x, Acc* y) { y[0] = Bce::target_grad(x[0], x[1], x[2], x[3]); }},
};

// in: (count, arguments); out: (count, results). False where there is no such function.
template <class Acc>
bool evaluate(const char* name, const Acc* in, Acc* out, std::int64_t count, int arguments, int results) {
  for (const Row<Acc>& row : kTable<Acc>) {
    if (std::strcmp(row.name, name) != 0) continue;
    for (std::int64_t i = 0; i < count; ++i) row.evaluate(in + i * arguments, out + i * results);
    return true;
  }
  return false;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED bool evaluate_float32(const char* name, const float* in, float* out, std::int64_t count, int arguments,
                               int results) {
  return evaluate(name, in, out, count, arguments, results);
}

EXPORTED bool evaluate_float64(const char* name, const double* in, double* out, std::int64_t count, int arguments,
                               int results) {
  return evaluate(name, in, out, count, arguments, results);
}
