// Cross entropy: every traversal, type, pass and option, beside the formula of csrc/math/cross_entropy.h written out.

#include <array>
#include <cmath>

#include "cases.h"
#include "class_tensors.h"
#include "judge.h"
#include "run.h"

namespace check {
namespace {

using fusedloss::CrossEntropyArgs;
using fusedloss::Pass;
using fusedloss::Reduction;

struct Shape {
  std::int64_t outer, classes, inner;
  Placement logits;
  Placement gradient = logits;
};

struct Options {
  const char* name;
  Dtype index = Dtype::int64;
  Ignored ignored = Ignored::some;
  bool weighted = false;
  double smoothing = 0;
  bool probabilities = false;
  bool other_type = false;  // of the probabilities
  bool grad_probabilities = false;
  double z_loss = 0;
  double softcap = 0;
  bool lse = false;  // is returned, of ignored positions too, and a gradient flows back from it
  bool in_place = false;
  bool special = false;  // some rows hold infinities and NaN
  double scale = 3;      // of the logits
  double offset = 0;     // likewise
  Flow flow = Flow::one;
  Reduction reduction = Reduction::mean;
  bool each_loss = false;   // is written, beside the reduced one
  bool other_loss = false;  // in the input's type rather than the accumulate type, or the other way round
};

struct Problem {
  ClassShape shape;
  Options options;
  Dtype dtype;
  bool along_classes;  // they are neighbours in memory: sums are a tree's, not one thread's

  std::vector<double> logits;         // (positions, classes), as all of these
  std::vector<std::int64_t> targets;  // -1: ignored
  std::vector<double> weight;         // (classes,)
  std::vector<double> probabilities;  // empty where the target is class indices
  std::vector<double> grad_loss;      // (positions,)
  std::vector<double> grad_lse;       // (positions,)

  bool counts(std::int64_t position) const { return options.probabilities || targets[position] >= 0; }
};

// A row, worked out plainly in Real; and in `u`, half a unit in the last place of the accumulate type, what the
// kernels round off.
template <class Real>
class Row {
 public:
  Row(const Problem& problem, std::int64_t position) : problem_(problem), position_(position) {
    const Options& o = problem.options;
    classes_ = problem.shape.classes;
    u_ = unit(accumulate_type(problem.dtype));
    // Additions one after the other: few where lanes share a row. In a column all of them are one thread's; what they
    // round off goes up and down, and grows with the root of their number.
    depth_ = problem.along_classes ? 24 : 24 + 2 * std::sqrt(double(classes_));
    weight_of_position_ = problem.counts(position) ? 1 : 0;

    value_.resize(classes_);
    slope_.assign(classes_, 1);
    max_ = -std::numeric_limits<Real>::infinity();
    for (std::int64_t c = 0; c < classes_; ++c) {
      const Real x = problem.logits[position * classes_ + c];
      value_[c] = x;
      if (o.softcap != 0) {
        const Real t = std::tanh(x / Real(o.softcap));
        value_[c] = Real(o.softcap) * t;
        slope_[c] = (1 - t) * (1 + t);
      }
      if (value_[c] > max_) max_ = value_[c];
    }
    // A quotient, a hyperbolic tangent of two units and a product.
    if (o.softcap != 0) cap_error_ = 8 * u_ * double(std::fabs(max_) + Real(o.softcap) / 2);

    Real sum = 0, weighted_distance = 0;
    for (std::int64_t c = 0; c < classes_; ++c) {
      const Real e = std::exp(value_[c] - max_);
      sum += e;
      if (e > 0) weighted_distance += e * std::fabs(value_[c] - max_);
    }
    sum_ = sum;
    log_sum_ = std::log(sum);
    lse_ = max_ + log_sum_;
    // An exponential of two units whose argument is rounded twice, the additions, and the logarithm.
    log_sum_error_ =
        u_ * (depth_ + 4 + 4 * double(weighted_distance / sum) + 2 * std::fabs(double(log_sum_))) + 2 * cap_error_;
  }

  Truth max() const { return {double(max_), problem_.options.softcap != 0 ? cap_error_ : 0}; }
  Truth log_sum() const { return {double(log_sum_), log_sum_error_}; }
  Truth lse() const { return {double(lse_), log_sum_error_ + cap_error_ + u_ * std::fabs(double(lse_))}; }

  Truth loss() const {
    if (!problem_.counts(position_) || classes_ == 0) return {};
    const Options& o = problem_.options;
    Real loss = 0;
    double error = 0;
    for (std::int64_t c = 0; c < classes_; ++c) {
      const Real everywhere = dense_mass(c), here = target_mass(c), distance = value_[c] - max_;
      if (everywhere == 0 && here == 0 && !o.probabilities) continue;
      loss += (everywhere + here) * (log_sum_ - distance);
      const double terms = std::fabs(double(log_sum_)) + std::fabs(double(distance));
      error += double(everywhere + here) * (log_sum_error_ + 2 * cap_error_ + 6 * u_ * terms);
      error += double(everywhere) * terms * depth_ * u_;
    }
    if (o.z_loss != 0) {
      loss += Real(o.z_loss) * lse_ * lse_;
      error += o.z_loss * std::fabs(double(lse_)) * (2 * lse().tolerance + 4 * u_ * std::fabs(double(lse_)));
    }
    return {double(loss), error + 2 * u_ * std::fabs(double(loss))};
  }

  // flow: what flows into the loss, divided by the divisor already.
  std::vector<Truth> gradient(double flow, double grad_lse) const {
    const Options& o = problem_.options;
    std::vector<Truth> result(classes_);
    const Real g = Real(flow) * Real(weight_of_position_);
    Real mass = 0;
    for (std::int64_t c = 0; c < classes_; ++c) mass += dense_mass(c) + target_mass(c);
    Real normaliser = Real(grad_lse);
    double normaliser_error = 2 * u_ * std::fabs(grad_lse);
    if (weight_of_position_ > 0) {
      normaliser += g * mass;
      normaliser_error += std::fabs(double(g * mass)) * u_ * (depth_ + 8);
      if (o.z_loss != 0) {
        normaliser += g * 2 * Real(o.z_loss) * lse_;
        normaliser_error += std::fabs(double(g) * 2 * o.z_loss) * (lse().tolerance + 4 * u_ * std::fabs(double(lse_)));
      }
    } else if (grad_lse == 0) {
      return result;
    }
    const double acc_flush = smallest_normal(accumulate_type(problem_.dtype));
    for (std::int64_t c = 0; c < classes_; ++c) {
      const Real distance = value_[c] - max_, p = std::exp(distance) / sum_;
      const Real on_class = g * (dense_mass(c) + target_mass(c));
      const Real entry = p * normaliser - on_class;
      double error = 8 * u_ * std::fabs(double(on_class)) + acc_flush * std::fabs(double(normaliser));
      if (p > 0) {
        const double relative = u_ * (8 + 4 * std::fabs(double(distance)) + 2 * std::fabs(double(log_sum_))) +
                                log_sum_error_ + 2 * cap_error_;
        error += double(p) * (std::fabs(double(normaliser)) * relative + normaliser_error);
      }
      error = error * double(slope_[c]) + (o.softcap != 0 ? 8 * u_ * std::fabs(double(entry)) : 0);
      result[c] = {double(entry * slope_[c]), error};
    }
    return result;
  }

  std::vector<Truth> probability_gradient(double flow) const {
    const Real keep = Real(1) - Real(problem_.options.smoothing);
    std::vector<Truth> result(classes_);
    for (std::int64_t c = 0; c < classes_; ++c) {
      const Real distance = value_[c] - max_, factor = Real(flow) * keep * weight(c);
      const double terms = std::fabs(double(log_sum_)) + std::fabs(double(distance));
      result[c] = {double(factor * (log_sum_ - distance)),
                   std::fabs(double(factor)) * (log_sum_error_ + 2 * cap_error_ + 8 * u_ * terms)};
    }
    return result;
  }

 private:
  Real weight(std::int64_t c) const { return problem_.weight.empty() ? Real(1) : Real(problem_.weight[c]); }

  // The mass that every class has, and the one that the target class has on top.
  Real dense_mass(std::int64_t c) const {
    const Options& o = problem_.options;
    const Real spread = Real(o.smoothing) / Real(classes_);
    if (!o.probabilities) return spread * weight(c);
    const Real q = problem_.probabilities[position_ * classes_ + c];
    return weight(c) * ((Real(1) - Real(o.smoothing)) * q + spread);
  }
  Real target_mass(std::int64_t c) const {
    if (problem_.options.probabilities || problem_.targets[position_] != c) return 0;
    return (Real(1) - Real(problem_.options.smoothing)) * weight(c);
  }

  const Problem& problem_;
  const std::int64_t position_;
  std::int64_t classes_;
  double u_, depth_;
  double weight_of_position_;
  std::vector<Real> value_, slope_;
  Real max_, sum_, log_sum_, lse_;
  double log_sum_error_, cap_error_ = 0;
};

class Test {
 public:
  Test(const Shape& shape, const Options& options, Dtype dtype)
      : random_(shape.classes * 7919 + shape.inner * 31 + shape.logits.first),
        logits_("logits", dtype, {shape.outer, shape.classes, shape.inner}, shape.logits),
        gradient_("gradient", dtype, {shape.outer, shape.classes, shape.inner}, shape.gradient),
        probabilities_("probabilities", probabilities_type(options, dtype), {shape.outer, shape.classes, shape.inner},
                       shape.gradient),
        grad_probabilities_("gradient of the probabilities", probabilities_type(options, dtype),
                            {shape.outer, shape.classes, shape.inner}, shape.logits) {
    const Dtype acc = accumulate_type(dtype);
    problem_.shape = {shape.outer, shape.classes, shape.inner};
    problem_.options = options;
    problem_.dtype = dtype;
    problem_.along_classes = shape.logits.order == Order::rows && shape.gradient.order == Order::rows;
    const std::int64_t positions = problem_.shape.positions();
    const Dtype loss_type = options.other_loss ? (dtype == acc ? Dtype::bfloat16 : dtype) : acc;
    targets_ = one_each("targets", options.index, positions);
    weight_ = one_each("weight", acc, shape.classes);
    max_ = one_each("row maximum", acc, positions);
    log_sum_ = one_each("row log sum", acc, positions);
    lse_ = one_each("lse", acc, positions);
    grad_lse_ = one_each("gradient of the lse", acc, positions);
    loss_ = one_each("loss", loss_type, positions);
    total_ = one_each("total", loss_type, 1);
    divisor_ = one_each("divisor", Dtype::float64, 1);
    grad_loss_ = one_each("gradient of the loss", loss_type, options.flow == Flow::each ? positions : 1);
    make_inputs();
  }

  void run() {
    forward();
    backward();
    if (problem_.options.reduction != Reduction::none) forward_with_gradient();
  }

 private:
  static Dtype probabilities_type(const Options& options, Dtype dtype) {
    if (!options.other_type) return dtype;
    return dtype == Dtype::float32 ? Dtype::bfloat16 : Dtype::float32;
  }

  void make_inputs() {
    const Options& o = problem_.options;
    const std::int64_t positions = problem_.shape.positions(), classes = problem_.shape.classes;
    Tensor& logits = logits_.tensor();
    for (std::int64_t k = 0; k < logits.size(); ++k) logits.set(k, o.offset + o.scale * random_.bell());
    problem_.targets = random_targets(random_, positions, classes, o.index, o.ignored);
    if (o.special) make_special();
    for (std::int64_t k = 0; k < logits.size(); ++k) problem_.logits.push_back(logits.of_cpu(k));
    for (std::int64_t i = 0; i < positions; ++i) {
      targets_->set(i, double(problem_.targets[i] < 0 ? ignore_index_of(o.index) : problem_.targets[i]));
    }
    if (o.weighted) {
      for (std::int64_t c = 0; c < classes; ++c) weight_->set(c, c % 5 == 3 ? 0 : 0.5 + random_.uniform());
      for (std::int64_t c = 0; c < classes; ++c) problem_.weight.push_back(weight_->of_cpu(c));
    }
    if (o.probabilities) {
      Tensor& q = probabilities_.tensor();
      for (std::int64_t k = 0; k < q.size(); ++k) q.set(k, 2 * random_.uniform() / double(classes));
      for (std::int64_t k = 0; k < q.size(); ++k) problem_.probabilities.push_back(q.of_cpu(k));
    }
    problem_.grad_loss.assign(positions, 1);
    if (o.flow != Flow::absent) {
      for (std::int64_t k = 0; k < grad_loss_->size(); ++k) grad_loss_->set(k, 0.5 + random_.uniform());
      for (std::int64_t i = 0; i < positions; ++i) {
        problem_.grad_loss[i] = grad_loss_->of_cpu(o.flow == Flow::each ? i : 0);
      }
    }
    problem_.grad_lse.assign(positions, 0);
    if (o.lse) {
      for (std::int64_t i = 0; i < positions; ++i) grad_lse_->set(i, random_.bell());
      for (std::int64_t i = 0; i < positions; ++i) problem_.grad_lse[i] = grad_lse_->of_cpu(i);
    }
    for (Tensor* tensor : inputs()) tensor->upload();
  }

  void make_special() {
    const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
    const std::int64_t classes = problem_.shape.classes;
    for (std::int64_t i = 0; i < problem_.shape.positions(); ++i) {
      const std::int64_t target = std::max<std::int64_t>(problem_.targets[i], 0), other = (target + 1) % classes;
      const auto set = [&](std::int64_t c, double value) { logits_.tensor().set(i * classes + c, value); };
      switch (i % 9) {
        case 0: set(other, infinity); break;
        case 1: set(target, -infinity); break;
        case 4: set(other, nan); break;
        case 5:
          for (std::int64_t c = 0; c < classes; ++c) set(c, -infinity);
          break;
        case 6: set(other, -infinity); break;
        case 7: set(target, infinity); break;
        default: break;
      }
    }
  }

  std::vector<Tensor*> inputs() {
    return {&logits_.tensor(), &probabilities_.tensor(), targets_.get(),
            weight_.get(),     grad_loss_.get(),         grad_lse_.get()};
  }

  // The arguments of every pass, on one side.
  CrossEntropyArgs arguments(bool on_device) {
    const Options& o = problem_.options;
    const auto place = [&](Tensor& tensor) { return on_device ? tensor.on_device() : tensor.on_cpu(); };
    CrossEntropyArgs args;
    args.shape = problem_.shape;
    args.logits = on_device ? logits_.on_device() : logits_.on_cpu();
    args.has_probabilities = o.probabilities;
    if (o.probabilities) {
      args.probabilities = on_device ? probabilities_.on_device() : probabilities_.on_cpu();
    } else {
      args.target = {{place(*targets_), o.index, 1}, ignore_index_of(o.index)};
    }
    if (o.weighted) args.weight = place(*weight_);
    args.label_smoothing = o.smoothing;
    args.z_loss = o.z_loss;
    args.logit_softcap = o.softcap;
    args.row_max = place(*max_);
    args.row_log_sum = place(*log_sum_);
    args.every_lse = o.lse;
    if (o.lse) args.lse = place(*lse_);
    if (o.each_loss || o.reduction == Reduction::none) args.loss = {place(*loss_), loss_->dtype(), 1};
    args.total = {o.reduction, o.reduction == Reduction::none ? nullptr : place(*total_), total_->dtype(),
                  static_cast<double*>(place(*divisor_))};
    if (o.flow != Flow::absent) {
      args.flow.grad_loss = {place(*grad_loss_), grad_loss_->dtype(), o.flow == Flow::each ? 1 : 0};
    }
    return args;
  }

  ClassTensor gradient(bool on_device) {
    ClassValues& values = problem_.options.in_place ? logits_ : gradient_;
    return on_device ? values.on_device() : values.on_cpu();
  }

  Tensor& gradient_tensor() { return (problem_.options.in_place ? logits_ : gradient_).tensor(); }

  template <class F>
  void with_row(std::int64_t position, F body) const {
    if (problem_.dtype == Dtype::float64) {
      body(Row<long double>(problem_, position));
    } else {
      body(Row<double>(problem_, position));
    }
  }

  void forward() {
    const Options& o = problem_.options;
    std::vector<Tensor*> tensors = inputs();
    std::vector<Tensor*> outputs{max_.get(), log_sum_.get(), divisor_.get()};
    if (o.lse) outputs.push_back(lse_.get());
    if (o.each_loss || o.reduction == Reduction::none) outputs.push_back(loss_.get());
    if (o.reduction != Reduction::none) outputs.push_back(total_.get());
    for (Tensor* tensor : inputs()) tensor->takes_role(Role::input);
    for (Tensor* tensor : outputs) tensor->takes_role(Role::output);
    tensors.insert(tensors.end(), outputs.begin(), outputs.end());
    run_cpu(&fusedloss::cpu::Kernels::cross_entropy, Pass::forward, arguments(false), tensors);
    run_device(fusedloss::cuda::kKernels.cross_entropy, Pass::forward, arguments(true), tensors);
    judge_forward("forward", true);
    for (Tensor* tensor : {max_.get(), log_sum_.get(), divisor_.get()}) tensor->becomes_input();
  }

  void judge_forward(const char* pass, bool has_divisor) {
    const Options& o = problem_.options;
    const std::int64_t positions = problem_.shape.positions();
    Truth total;
    double divisor = 0;
    for (std::int64_t i = 0; i < positions; ++i) {
      with_row(i, [&](const auto& row) {
        const bool known = problem_.counts(i) || o.lse;
        const Truth loss = row.loss();
        total.value += loss.value;
        total.tolerance += loss.tolerance;
        if (problem_.counts(i) && problem_.shape.classes > 0) divisor += weight_of(i);
        if (o.each_loss || o.reduction == Reduction::none) judge(pass, *loss_, i, loss);
        if (!known) return;
        judge(pass, *max_, i, row.max());
        judge(pass, *log_sum_, i, row.log_sum());
        if (o.lse) judge(pass, *lse_, i, row.lse());
      });
    }
    // Weights are added in float64, in any order.
    if (has_divisor) judge(pass, *divisor_, 0, {divisor, 1e-15 * divisor * (o.weighted ? double(positions) : 0)});
    if (o.reduction == Reduction::none) return;
    if (o.reduction == Reduction::mean) total = {total.value / divisor, total.tolerance / divisor};
    judge(pass, *total_, 0, total);
  }

  double weight_of(std::int64_t position) const {
    return problem_.options.weighted && !problem_.options.probabilities ? problem_.weight[problem_.targets[position]]
                                                                        : 1;
  }

  double known_divisor() const {
    double divisor = 0;
    for (std::int64_t i = 0; i < problem_.shape.positions(); ++i) divisor += problem_.counts(i) ? weight_of(i) : 0;
    return problem_.options.reduction == Reduction::mean ? divisor : 1;
  }

  void backward() {
    const Options& o = problem_.options;
    std::vector<Tensor*> tensors = inputs();
    gradient_tensor().takes_role(o.in_place ? Role::in_place : Role::output);
    if (!o.in_place) tensors.push_back(&gradient_.tensor());
    const auto with_gradients = [&](bool on_device) {
      CrossEntropyArgs args = arguments(on_device);
      const auto place = [&](Tensor& tensor) { return on_device ? tensor.on_device() : tensor.on_cpu(); };
      args.loss = {};
      args.lse = nullptr;
      args.total = {};
      args.every_lse = false;
      if (o.reduction == Reduction::mean) args.flow.divisor = static_cast<const double*>(place(*divisor_));
      if (o.lse) args.grad_lse = place(*grad_lse_);
      args.grad_logits = gradient(on_device);
      if (o.grad_probabilities) {
        args.grad_probabilities = on_device ? grad_probabilities_.on_device() : grad_probabilities_.on_cpu();
      }
      return args;
    };
    for (Tensor* tensor : {max_.get(), log_sum_.get(), divisor_.get()}) tensors.push_back(tensor);
    if (o.grad_probabilities) tensors.push_back(&grad_probabilities_.tensor());
    run_cpu(&fusedloss::cpu::Kernels::cross_entropy, Pass::backward, with_gradients(false), tensors);
    run_device(fusedloss::cuda::kKernels.cross_entropy, Pass::backward, with_gradients(true), tensors);
    judge_gradient("backward", true);
    if (!o.grad_probabilities) return;

    // The gradient to the probabilities alone.
    const auto alone = [&](bool on_device) {
      CrossEntropyArgs args = with_gradients(on_device);
      args.grad_logits.data = nullptr;
      return args;
    };
    tensors = {&logits_.tensor(), &grad_probabilities_.tensor()};
    logits_.tensor().takes_role(o.in_place ? Role::in_place : Role::input);
    run_cpu(&fusedloss::cpu::Kernels::cross_entropy, Pass::backward, alone(false), tensors);
    run_device(fusedloss::cuda::kKernels.cross_entropy, Pass::backward, alone(true), tensors);
    judge_probability_gradient("backward to the probabilities");
  }

  void judge_gradient(const char* pass, bool has_lse) {
    const Options& o = problem_.options;
    const std::int64_t classes = problem_.shape.classes;
    const double divisor = known_divisor();
    const Tensor& gradient = gradient_tensor();
    for (std::int64_t i = 0; i < problem_.shape.positions(); ++i) {
      with_row(i, [&](const auto& row) {
        const double grad_lse = has_lse ? problem_.grad_lse[i] : 0;
        const std::vector<Truth> truths = row.gradient(problem_.grad_loss[i] / divisor, grad_lse);
        for (std::int64_t c = 0; c < classes; ++c) {
          const std::int64_t k = i * classes + c;
          if (!problem_.counts(i) && !(has_lse && o.lse)) {
            EXPECT(gradient.of_device(k) == 0, "%s: entry (%ld, %ld) of an ignored position has the gradient %g", pass,
                   long(i), long(c), gradient.of_device(k));
          } else {
            judge(pass, gradient, k, truths[c]);
          }
        }
      });
    }
    if (has_lse && o.grad_probabilities) judge_probability_gradient(pass);
  }

  void judge_probability_gradient(const char* pass) {
    const double divisor = known_divisor();
    const std::int64_t classes = problem_.shape.classes;
    for (std::int64_t i = 0; i < problem_.shape.positions(); ++i) {
      with_row(i, [&](const auto& row) {
        const std::vector<Truth> truths = row.probability_gradient(problem_.grad_loss[i] / divisor);
        for (std::int64_t c = 0; c < classes; ++c)
          judge(pass, grad_probabilities_.tensor(), i * classes + c, truths[c]);
      });
    }
  }

  // One gradient flows into all losses here, and statistics are written only where they are wanted.
  void forward_with_gradient() {
    const Options& o = problem_.options;
    const bool statistics = o.lse;
    std::vector<Tensor*> tensors = inputs();
    gradient_tensor().takes_role(o.in_place ? Role::in_place : Role::output);
    std::vector<Tensor*> outputs{total_.get()};
    if (o.each_loss) outputs.push_back(loss_.get());
    if (statistics) {
      for (Tensor* tensor : {max_.get(), log_sum_.get(), lse_.get(), divisor_.get()}) outputs.push_back(tensor);
    }
    for (Tensor* tensor : outputs) tensor->takes_role(Role::output);
    if (!o.in_place) outputs.push_back(&gradient_.tensor());
    tensors.insert(tensors.end(), outputs.begin(), outputs.end());
    const auto with_gradient = [&](bool on_device) {
      CrossEntropyArgs args = arguments(on_device);
      if (o.flow == Flow::each) args.flow.grad_loss.stride = 0;
      if (!statistics) args.row_max = args.row_log_sum = args.total.divisor = nullptr;
      args.grad_logits = gradient(on_device);
      return args;
    };
    if (o.flow == Flow::each) {
      for (double& flow : problem_.grad_loss) flow = grad_loss_->of_cpu(0);
    }
    run_cpu(&fusedloss::cpu::Kernels::cross_entropy, Pass::forward_with_gradient, with_gradient(false), tensors);
    run_device(fusedloss::cuda::kKernels.cross_entropy, Pass::forward_with_gradient, with_gradient(true), tensors);
    if (statistics) {
      judge_forward("forward with gradient", true);
    } else {
      judge_total("forward with gradient");
    }
    judge_gradient("forward with gradient", false);
  }

  void judge_total(const char* pass) {
    Truth total;
    for (std::int64_t i = 0; i < problem_.shape.positions(); ++i) {
      with_row(i, [&](const auto& row) {
        const Truth loss = row.loss();
        total.value += loss.value;
        total.tolerance += loss.tolerance;
        if (problem_.options.each_loss) judge(pass, *loss_, i, loss);
      });
    }
    const double divisor = known_divisor();
    judge(pass, *total_, 0, {total.value / divisor, total.tolerance / divisor});
  }

  Random random_;
  Problem problem_;
  ClassValues logits_, gradient_, probabilities_, grad_probabilities_;
  std::unique_ptr<Tensor> targets_, weight_, max_, log_sum_, lse_, grad_lse_, loss_, total_, divisor_, grad_loss_;
};

// --- The table ----------------------------------------------------------------------------------------------------

const std::vector<Options>& all_options() {
  static const std::vector<Options> table{
      {.name = "plain"},
      {.name = "each loss", .flow = Flow::each, .reduction = Reduction::none},
      {.name = "weights, z loss", .index = Dtype::int32, .weighted = true, .z_loss = 1e-2, .reduction = Reduction::sum},
      {.name = "smoothing", .smoothing = 0.1, .flow = Flow::absent, .each_loss = true, .other_loss = true},
      {.name = "weights, smoothing", .index = Dtype::uint8, .weighted = true, .smoothing = 0.2, .flow = Flow::each},
      {.name = "soft cap", .softcap = 30, .scale = 20, .reduction = Reduction::sum, .each_loss = true},
      {.name = "probabilities",
       .probabilities = true,
       .grad_probabilities = true,
       .flow = Flow::each,
       .each_loss = true},
      {.name = "probabilities, weights, smoothing",
       .weighted = true,
       .smoothing = 0.1,
       .probabilities = true,
       .other_type = true,
       .grad_probabilities = true,
       .z_loss = 1e-3,
       .other_loss = true},
      {.name = "lse", .z_loss = 1e-3, .softcap = 20, .lse = true, .flow = Flow::each, .each_loss = true},
      {.name = "lse, weights", .weighted = true, .lse = true, .reduction = Reduction::sum},
      {.name = "in place", .in_place = true},
      {.name = "in place, general",
       .weighted = true,
       .smoothing = 0.1,
       .z_loss = 1e-3,
       .softcap = 25,
       .in_place = true,
       .flow = Flow::absent,
       .reduction = Reduction::sum},
      {.name = "all ignored", .ignored = Ignored::all, .each_loss = true},
      {.name = "all ignored, lse", .ignored = Ignored::all, .lse = true, .reduction = Reduction::sum},
      {.name = "none ignored, alike",
       .ignored = Ignored::none,
       .scale = 0.1,
       .reduction = Reduction::sum,
       .each_loss = true},
      {.name = "large", .offset = 1000, .flow = Flow::absent, .reduction = Reduction::sum, .other_loss = true},
      {.name = "special", .lse = true, .special = true, .flow = Flow::each, .each_loss = true},
      {.name = "special, smoothing",
       .smoothing = 0.1,
       .z_loss = 1e-3,
       .special = true,
       .reduction = Reduction::sum,
       .each_loss = true},
      {.name = "special, soft cap", .softcap = 30, .special = true, .reduction = Reduction::none},
      {.name = "special, probabilities",
       .probabilities = true,
       .grad_probabilities = true,
       .in_place = true,
       .special = true,
       .each_loss = true},
  };
  return table;
}

std::vector<Shape> shapes(Level level) {
  std::vector<Shape> result;
  const Placement odd{Order::rows, 1, 0}, gaps{Order::rows, 1, 3}, spread{Order::rows, 0, 8};
  const auto rows = [&](std::int64_t count, std::int64_t classes, std::vector<Placement> placements) {
    for (const Placement& placement : placements) result.push_back({1, classes, count, placement});
  };
  if (level == Level::full) {
    // Few classes: several tiles, the last one ragged.
    for (const std::int64_t classes : {1, 2, 7, 10, 16, 19, 32, 33, 64}) rows(577, classes, {{}, odd, gaps});
    for (const std::int64_t classes : {91, 128, 1000, 1024}) rows(37, classes, {{}, odd, gaps, spread});
    // More tiles than blocks that fit on the device, and a divisor that is counted by a launch of its own.
    result.push_back({1, 3, 70001, {}});
    result.push_back({1, 129, 9001, odd});
    // Many classes: fewer rows than multiprocessors, and more.
    for (const std::int64_t classes : {1025, 2049, 8193}) rows(5, classes, {{}, odd, gaps, spread});
    rows(301, 1025, {odd});
    rows(140, 2049, {{}});
    for (const std::int64_t classes : {50257, 128256}) rows(2, classes, {{}, gaps});
    rows(1, 50257, {odd});
    // Rows with an outer dimension, as channels_last has them; and a gradient that lies elsewhere in its packets, or in
    // another order.
    result.push_back({3, 19, 35, gaps});
    result.push_back({3, 1025, 2, gaps});
    result.push_back({1, 33, 130, {}, {Order::rows, 3, 0}});
    result.push_back({1, 1000, 9, odd, gaps});
    result.push_back({1, 2050, 3, odd, {Order::rows, 2, 1}});
    result.push_back({1, 33, 65, {}, {Order::columns, 0, 0}});
    // Columns: odd and even inner sizes, in one piece and with gaps; packets of positions, where there are enough.
    for (const std::int64_t classes : {1, 7, 19, 33}) {
      result.push_back({2, classes, 35, {Order::columns, 0, 0}});
      result.push_back({3, classes, 64, {Order::columns, 1, 2}});
    }
    result.push_back({2, 19, 8192, {Order::columns, 0, 0}});
    result.push_back({3, 5, 4096, {Order::columns, 0, 8}});
    result.push_back({2, 7, 4096, {Order::columns, 0, 0}, {Order::columns, 1, 0}});
    result.push_back({1, 300, 8192, {Order::columns, 0, 0}});
    result.push_back({2, 1000, 5, {Order::columns, 0, 0}});
    result.push_back({1, 2, 200003, {Order::columns, 0, 0}});
    // Any strides.
    for (const std::int64_t classes : {1, 33, 1025}) result.push_back({2, classes, 3, {Order::strided, 1, 0}});
    result.push_back({1, 50257, 2, {Order::strided, 0, 0}});
    result.push_back({1, 50257, 3, {Order::columns, 0, 0}});
  } else {
    for (const std::int64_t classes : {1, 7, 19, 33}) rows(300, classes, {odd, gaps});
    rows(9, 1000, {{}, odd});
    rows(21, 257, {spread});
    // Rounds of tiles, where the device is small: two buffers take turns.
    rows(2100, 5, {{}});
    rows(530, 33, {odd});
    rows(70, 130, {{}});
    // Blocks, slices and clusters.
    rows(1, 1025, {odd});
    rows(5, 1030, {gaps});
    rows(1, 4300, {{}, odd});
    rows(3, 2200, {gaps});
    rows(1, 8500, {odd});
    result.push_back({3, 19, 5, gaps});
    result.push_back({1, 33, 65, {}, {Order::rows, 3, 0}});
    result.push_back({1, 1040, 2, odd, {Order::rows, 2, 1}});
    result.push_back({1, 33, 9, {}, {Order::columns, 0, 0}});
    result.push_back({2, 7, 35, {Order::columns, 0, 0}});
    result.push_back({3, 19, 16, {Order::columns, 1, 2}});
    result.push_back({2, 3, 4096, {Order::columns, 0, 0}});
    result.push_back({1, 1000, 3, {Order::columns, 0, 0}});
    result.push_back({2, 33, 3, {Order::strided, 1, 0}});
  }
  // Nothing at all: a mean over nothing, and losses without classes.
  result.push_back({0, 7, 3, {}});
  result.push_back({1, 0, 5, {}});
  result.push_back({2, 5, 0, {Order::columns, 0, 0}});
  return result;
}

std::string name_of(const Shape& shape, const Options& options, Dtype dtype) {
  const auto placed = [](const Placement& p) {
    const char* orders[] = {"rows", "columns", "strided"};
    return std::string(orders[int(p.order)]) + "+" + std::to_string(p.first) + "/" + std::to_string(p.pad);
  };
  const std::string size =
      std::to_string(shape.outer) + "x" + std::to_string(shape.classes) + "x" + std::to_string(shape.inner);
  return std::string("cross entropy, ") + check::name_of(dtype) + ", " + size + " " + placed(shape.logits) + " to " +
         placed(shape.gradient) + ", " + options.name;
}

}  // namespace

void add_cross_entropy(std::vector<Case>& cases, const Selection& selection) {
  const auto& options = all_options();
  int turn = selection.rotation;
  for (const Shape& shape : shapes(selection.level)) {
    const std::int64_t size = shape.outer * shape.classes * shape.inner;
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64}) {
      // Every how many-th of the options meets this shape and type; a prime step, so that all meet over the shapes.
      const int step = selection.level == Level::small ? 19 : size > 20000 ? 7 : size > 2000 ? 3 : 1;
      turn += 1;
      for (int i = turn % step; i < int(options.size()); i += step) {
        const Options& o = options[i];
        // Without classes there is no index; an element to be special needs a neighbour.
        if (shape.classes == 0 && !o.probabilities && o.ignored != Ignored::all) continue;
        if (o.special && shape.classes < 2) continue;
        if (o.in_place && (shape.gradient.order != shape.logits.order || shape.gradient.first != shape.logits.first ||
                           shape.gradient.pad != shape.logits.pad)) {
          continue;
        }
        cases.push_back({name_of(shape, o, dtype), [shape, o, dtype] { Test(shape, o, dtype).run(); }});
      }
    }
  }
}

}  // namespace check
