// Losses over classes: a case is a shape, how it lies in memory, and options; it runs every pass. The truth is the
// definition in csrc/math/cross_entropy.h, written out in double precision.

#pragma once

#include <algorithm>
#include <string>

#include "launch.h"

using fusedloss::ClassShape;
using fusedloss::ClassTensor;
using fusedloss::CrossEntropyArgs;
using fusedloss::NllArgs;
using fusedloss::Reduction;

enum class Layout {
  rows,     // classes are neighbours; rows follow one another at classes + pad
  columns,  // positions are neighbours; classes follow one another at inner + pad
  strided,  // no neighbours: every third element
};

struct ClassOptions {
  const char* name;
  Reduction reduction = Reduction::mean;
  int ignored = 0;  // one in so many; 1: all
  bool weight = false;
  double smoothing = 0;
  double z_loss = 0;
  double softcap = 0;
  bool probabilities = false;
  Dtype probability_dtype = Dtype::float32;
  bool lse = false;  // wanted of every position, with a gradient of its own
  bool grad_probabilities = false;
  bool only_grad_probabilities = false;
  bool in_place = false;
  bool specials = false;  // rows with infinities and NaN
  double scale = 1;
  bool sample_weight = false;  // some of them zero; NaN where a position is ignored
  Dtype sample_weight_dtype = Dtype::float32;
  double denominator = 0;  // of the mean; 0: what is counted
  bool entropy = false;    // wanted of every position, with a gradient of its own in backward
  bool argmax = false;     // of logits that are whole numbers, most rows' largest more than once
  bool peaked = false;     // every second row has an entropy of a millionth or a few
  Dtype index = Dtype::int64;
  int index_lead = 0;  // elements before the first
  int before = 0;      // classes that are elsewhere, before these and
  int after = 0;       // behind them

  bool is_part() const { return before + after > 0; }
};

struct ClassCase {
  ClassShape shape;
  Layout layout = Layout::rows;
  Dtype dtype = Dtype::float32;
  int lead = 0;  // elements before the logits; before the gradient one more, if `skewed`
  int pad = 0;
  bool skewed = false;
};

inline std::string describe(const char* loss, const ClassCase& c, const ClassOptions& options) {
  constexpr const char* kLayouts[] = {"rows", "columns", "strided"};
  char text[256];
  std::snprintf(text, sizeof(text), "%s (%ld, %ld, %ld) %s %s lead %d pad %d%s, %s", loss, long(c.shape.outer),
                long(c.shape.classes), long(c.shape.inner), name_of(c.dtype), kLayouts[int(c.layout)], c.lead, c.pad,
                c.skewed ? " skewed" : "", options.name);
  return text;
}

struct Strides {
  std::int64_t outer, classes, inner;

  static Strides of(const ClassShape& shape, Layout layout, int pad) {
    if (layout == Layout::rows) return {shape.inner * (shape.classes + pad), 1, shape.classes + pad};
    if (layout == Layout::columns) return {shape.classes * (shape.inner + pad), shape.inner + pad, 1};
    return {shape.inner * (3 * shape.classes + pad), 3, 3 * shape.classes + pad};
  }
  std::int64_t extent(const ClassShape& shape) const {
    if (shape.positions() == 0 || shape.classes == 0) return 0;
    return 1 + (shape.outer - 1) * outer + (shape.classes - 1) * classes + (shape.inner - 1) * inner;
  }
  std::int64_t at(const ClassShape& shape, std::int64_t position, std::int64_t c) const {
    return position / shape.inner * outer + position % shape.inner * inner + c * classes;
  }
  ClassTensor tensor(const Buffer& buffer, bool on_device) const {
    return {buffer.data(on_device), buffer.dtype(), outer, classes, inner};
  }
};

// Nothing but the tensor's own elements may have been written.
inline void check_gaps(const std::string& what, const Buffer& buffer, const Strides& strides, const ClassShape& shape) {
  std::vector<char> is_element(buffer.count(), 0);
  for (std::int64_t i = 0; i < shape.positions(); ++i) {
    for (std::int64_t c = 0; c < shape.classes; ++c) is_element[strides.at(shape, i, c)] = 1;
  }
  bool untouched = buffer.lead_is_poison();
  for (std::int64_t i = 0; i < buffer.count(); ++i) untouched = untouched && (is_element[i] || buffer.is_poison(i));
  EXPECT(untouched, "%s: written beside the gradient", what.c_str());
}

// Both answers against the truth, and against each other. Where the truth is not a number of the formulas (rows with
// infinities), the CPU's answer is the truth.
class Comparison {
 public:
  explicit Comparison(std::string what) : what_(std::move(what)) {}

  void operator()(const char* name, std::int64_t position, std::int64_t c, const Buffer& buffer, std::int64_t at,
                  double truth, double tolerance, bool has_truth = true) {
    const double got = buffer.got(at), cpu = buffer.at(at);
    // Beyond the type's largest number it rounds to infinity. No case comes near that of the other types.
    constexpr double kLargestHalf = 65504;
    if (buffer.dtype() == Dtype::float16 && std::fabs(truth) > kLargestHalf) truth = std::copysign(INFINITY, truth);
    if (has_truth) {
      EXPECT(agree(got, truth, tolerance), "%s: %s (%ld, %ld): %.9g, truth %.9g, tolerance %.3g, CPU %.9g",
             what_.c_str(), name, long(position), long(c), got, truth, tolerance, cpu);
    }
    // A row with an infinity or NaN is either that as well, or has nothing but coarse numbers in it.
    if (!has_truth) tolerance = 1e-2 * (1 + std::fabs(cpu));
    EXPECT(agree(got, cpu, 2 * tolerance), "%s: %s (%ld, %ld): %.9g, on the CPU %.9g, tolerance %.3g", what_.c_str(),
           name, long(position), long(c), got, cpu, tolerance);
  }

 private:
  std::string what_;
};

// What the definition says of one position.
struct Truth {
  bool counts = true;
  bool finite = true;  // the largest logit is a number, and none is NaN
  double max = 0, log_sum = 0, lse = 0, loss = 0, mass = 0;
  double spread = 0;  // the sum of |mass (log_sum - shifted)|: what the loss is added up from
  double weight = 0;  // in the divisor
  double sample_weight = 1;
  double gap = 0, entropy = 0;
  std::int64_t argmax = 0;
};

class CrossEntropyCheck {
 public:
  CrossEntropyCheck(const CpuReference& cpu, const ClassCase& c, const ClassOptions& options)
      : cpu_(cpu),
        case_(c),
        options_(options),
        what_(describe("cross_entropy", c, options)),
        shape_(c.shape),
        strides_(Strides::of(c.shape, c.layout, c.pad)),
        acc_(accumulate_type(c.dtype)) {
    fill();
    find_truth();
  }

  void run() {
    ++cases();
    forward();
    forward_with_gradient();
    backward();
  }

 private:
  double logit(std::int64_t position, std::int64_t c) const { return logits_.at(strides_.at(shape_, position, c)); }
  double seen(double x) const {
    x *= options_.scale;
    return options_.softcap == 0 ? x : options_.softcap * std::tanh(x / options_.softcap);
  }
  // Something is wanted of ignored positions too.
  bool every_row() const { return options_.lse || options_.entropy || options_.argmax; }

  void fill() {
    Random random(shape_.classes * 31 + shape_.positions() * 7 + case_.lead + int(case_.dtype) * 1000003);
    const std::int64_t positions = shape_.positions(), classes = shape_.classes, extent = strides_.extent(shape_);
    logits_ = Buffer(case_.dtype, extent, case_.lead);
    for (std::int64_t i = 0; i < positions; ++i) {
      // Large common parts: what must not reach the differences.
      const double common = i % 3 == 2 ? 40 : 0;
      for (std::int64_t c = 0; c < classes; ++c) {
        double x = 3 * random.normal() + common;
        if (options_.argmax) x = std::round(x);
        if (options_.peaked && i % 2 == 0) x = c == i % classes ? 20 : 3 - std::log(double(classes)) + x / 64;
        if (options_.specials) {
          const std::int64_t kind = i % 7;
          if (kind == 1 && c % 2 == 0) x = -INFINITY;  // some entries
          if (kind == 2) x = -INFINITY;                // all of them
          if (kind == 3 && c == classes / 2) x = INFINITY;
          if (kind == 4 && c == classes - 1) x = NAN;
          if (kind == 5 && c <= 1) x = INFINITY;
        }
        logits_.set(strides_.at(shape_, i, c), x);
      }
    }
    logits_.upload();
    if (options_.probabilities) {
      probability_strides_ = Strides::of(shape_, case_.layout, 0);
      probabilities_ = Buffer(options_.probability_dtype, probability_strides_.extent(shape_));
      for (std::int64_t i = 0; i < positions; ++i) {
        for (std::int64_t c = 0; c < classes; ++c) {
          // They need not add up to 1, and do not.
          probabilities_.set(probability_strides_.at(shape_, i, c), random.uniform() * 2 / double(classes));
        }
      }
      probabilities_.upload();
      if (options_.grad_probabilities) {
        grad_probabilities_ = Buffer(options_.probability_dtype, probability_strides_.extent(shape_));
      }
    } else {
      index_ = Buffer(options_.index, positions, options_.index_lead);
      const std::int64_t limit = options_.index == Dtype::uint8 ? std::min<std::int64_t>(classes, 255) : all_classes();
      for (std::int64_t i = 0; i < positions; ++i) {
        const bool ignored = limit == 0 || (options_.ignored > 0 && i % options_.ignored == options_.ignored - 1);
        index_.set(i, ignored ? double(ignore_index()) : double(random.below(limit)));
      }
      index_.upload();
    }
    if (options_.weight) {
      weight_ = Buffer(acc_, classes);
      for (std::int64_t c = 0; c < classes; ++c) weight_.set(c, 0.25 + random.uniform());
      weight_.upload();
    }
    if (options_.sample_weight) {
      sample_weight_ = Buffer(options_.sample_weight_dtype, positions);
      for (std::int64_t i = 0; i < positions; ++i) {
        const bool ignored = !options_.probabilities && std::int64_t(index_.at(i)) == ignore_index();
        sample_weight_.set(i, ignored ? NAN : i % 5 == 4 ? 0 : 0.5 + random.uniform());
      }
      sample_weight_.upload();
    }
    if (options_.denominator != 0) {
      denominator_ = Buffer(Dtype::float64, 1);
      denominator_.set(0, options_.denominator);
      denominator_.upload();
    }
    if (options_.entropy) {
      entropy_ = Buffer(acc_, positions);
      gap_ = Buffer(acc_, positions);
      grad_entropy_ = Buffer(acc_, positions);
      for (std::int64_t i = 0; i < positions; ++i) grad_entropy_.set(i, random.normal());
      grad_entropy_.upload();
    }
    if (options_.argmax) argmax_ = Buffer(Dtype::int64, positions);
    if (options_.is_part()) mass_ = Buffer(acc_, positions);
    max_ = Buffer(acc_, positions);
    log_sum_ = Buffer(acc_, positions);
    if (options_.lse) {
      lse_ = Buffer(acc_, positions);
      grad_lse_ = Buffer(acc_, positions);
      for (std::int64_t i = 0; i < positions; ++i) grad_lse_.set(i, random.normal());
      grad_lse_.upload();
    }
    if (options_.reduction == Reduction::none) {
      loss_ = Buffer(case_.dtype, positions);
      grad_loss_ = Buffer(case_.dtype, positions);
      for (std::int64_t i = 0; i < positions; ++i) grad_loss_.set(i, 0.5 + random.uniform());
    } else {
      total_ = Buffer(case_.dtype, 1);
      grad_loss_ = Buffer(case_.dtype, 1);
      grad_loss_.set(0, 0.75);
    }
    grad_loss_.upload();
    divisor_ = Buffer(Dtype::float64, 1);
    if (!options_.only_grad_probabilities) {
      grad_ = Buffer(case_.dtype, extent, case_.lead + (case_.skewed ? 1 : 0));
    }
  }

  std::int64_t ignore_index() const { return options_.index == Dtype::uint8 ? 255 : -100; }
  std::int64_t all_classes() const { return options_.before + shape_.classes + options_.after; }
  double weight(std::int64_t c) const { return weight_ ? weight_.at(c) : 1; }
  double mass(std::int64_t position, std::int64_t c) const {
    const double s = options_.smoothing, spread = s / double(all_classes());
    if (options_.probabilities) {
      return weight(c) * ((1 - s) * probabilities_.at(probability_strides_.at(shape_, position, c)) + spread);
    }
    const double on_all = spread * weight(c);
    return c == std::int64_t(index_.at(position)) - options_.before ? on_all + (1 - s) * weight(c) : on_all;
  }

  void find_truth() {
    truth_.resize(shape_.positions());
    for (std::int64_t i = 0; i < shape_.positions(); ++i) {
      Truth& row = truth_[i];
      row.counts = options_.probabilities || std::int64_t(index_.at(i)) != ignore_index();
      const bool unweighted = !row.counts || shape_.classes == 0 || options_.is_part();
      row.weight = unweighted ? 0 : options_.probabilities ? 1 : weight(index_.at(i));
      if (sample_weight_ && row.counts) {
        // Rounded to the accumulate type first.
        row.sample_weight = acc_ == Dtype::float64 ? sample_weight_.at(i) : float(sample_weight_.at(i));
        row.weight *= row.sample_weight;
      }
      row.max = -INFINITY;
      for (std::int64_t c = 0; c < shape_.classes; ++c) {
        const double x = logit(i, c);
        row.finite = row.finite && !std::isnan(x);
        row.max = std::max(row.max, seen(x));
        const double largest = logit(i, row.argmax);
        if (x > largest || (std::isnan(x) && !std::isnan(largest))) row.argmax = c;
      }
      row.finite = row.finite && (std::isfinite(row.max) || shape_.classes == 0);
      long double sum = 0;  // as all long sums of the truth: in float64 their own rounding would show
      long double gap = 0;
      for (std::int64_t c = 0; c < shape_.classes; ++c) {
        const long double shifted = seen(logit(i, c)) - row.max, e = std::exp(shifted);
        sum += e;
        if (e > 0) gap -= e * shifted;
      }
      row.log_sum = static_cast<double>(std::log(sum));
      row.lse = row.max + row.log_sum;
      row.gap = static_cast<double>(gap / sum);
      row.entropy = static_cast<double>(std::log(sum) + gap / sum);
      if (!row.counts) continue;
      long double mass_sum = 0, loss = 0;
      for (std::int64_t c = 0; c < shape_.classes; ++c) {
        const double a = mass(i, c), entry = a == 0 ? 0 : a * (row.log_sum - (seen(logit(i, c)) - row.max));
        mass_sum += a;
        loss += entry;
        row.spread += std::fabs(entry) + a * row.log_sum;
      }
      row.mass = static_cast<double>(mass_sum);
      row.loss = static_cast<double>(loss) + options_.z_loss * row.lse * row.lse;
      row.spread += options_.z_loss * row.lse * row.lse;
      row.loss *= row.sample_weight;
      row.spread *= row.sample_weight;
      if (shape_.classes == 0) row.loss = 0;
    }
    long double counted = 0;
    for (const Truth& row : truth_) counted += row.weight;
    counted_ = denominator_ ? options_.denominator : static_cast<double>(counted);
  }

  // Half units in the last place that a sum over classes is off by: every thread adds up one part and then the parts
  // are added; errors of either sign grow with the square root of their number. Beside it a constant for the elementary
  // functions, and what the scale and the soft cap round off (of the size of the logits or the cap), which is an error
  // of the exponent. Where the kernel's type is that of the truth, both are off by as much.
  double units() const {
    return (acc_ == Dtype::float64 ? 32 : 16) + std::sqrt(double(shape_.classes)) + 6 * options_.softcap +
           (options_.scale != 1 ? 120 * options_.scale : 0);
  }
  double loss_tolerance(const Truth& row) const { return rounding(acc_) * units() * (1 + row.spread); }

  CrossEntropyArgs args(bool on_device) const {
    CrossEntropyArgs args;
    args.shape = shape_;
    args.logits = strides_.tensor(logits_, on_device);
    if (options_.is_part()) {
      args.first_class = options_.before;
      args.all_classes = all_classes();
    }
    args.has_probabilities = options_.probabilities;
    if (options_.probabilities) {
      args.probabilities = probability_strides_.tensor(probabilities_, on_device);
    } else {
      args.target = {{index_.data(on_device), options_.index, 1}, ignore_index()};
    }
    args.weight = weight_.data(on_device);
    args.sample_weight = {sample_weight_.data(on_device), options_.sample_weight_dtype, 1};
    args.label_smoothing = options_.smoothing;
    args.z_loss = options_.z_loss;
    args.logit_scale = options_.scale;
    args.logit_softcap = options_.softcap;
    args.total = {.reduction = options_.reduction,
                  .loss = total_.data(on_device),
                  .dtype = case_.dtype,
                  .divisor = static_cast<double*>(divisor_.data(on_device)),
                  .denominator = static_cast<const double*>(denominator_.data(on_device))};
    return args;
  }

  void check_totals(const std::string& what) {
    Comparison compare(what);
    if (shape_.classes > 0 && !options_.is_part()) {
      compare("divisor", 0, 0, divisor_, 0, counted_, 1e-13 * counted_);
    }
    if (!total_) return;
    long double sum = 0;
    double tolerance = 0;
    bool finite = true;
    for (const Truth& row : truth_) {
      if (!row.counts) continue;
      sum += row.loss;
      tolerance += loss_tolerance(row);
      finite = finite && row.finite;
    }
    const bool is_mean = options_.reduction == Reduction::mean;
    const double scale = is_mean ? 1 / counted_ : 1;
    const double truth = static_cast<double>(is_mean ? sum / counted_ : sum);
    tolerance = tolerance * scale + rounding(case_.dtype) * std::fabs(truth) + smallest(case_.dtype);
    compare("total", 0, 0, total_, 0, truth, tolerance, finite);
  }

  void forward() {
    const std::string what = what_ + ", forward";
    const auto with_outputs = [&](bool on_device) {
      CrossEntropyArgs with = args(on_device);
      with.row_max = max_.data(on_device);
      with.row_log_sum = log_sum_.data(on_device);
      with.lse = lse_.data(on_device);
      with.every_row = every_row();
      with.entropy = entropy_.data(on_device);
      with.row_gap = gap_.data(on_device);
      with.row_mass = mass_.data(on_device);
      with.argmax = static_cast<std::int64_t*>(argmax_.data(on_device));
      with.loss = {loss_.data(on_device), case_.dtype, 1};
      return with;
    };
    const auto outputs = {&max_, &log_sum_, &lse_, &entropy_, &gap_, &mass_, &argmax_, &loss_, &total_, &divisor_};
    const auto poison = [&] {
      for (Buffer* output : outputs) {
        if (*output) output->poison();
      }
    };
    launch_twice(what.c_str(), fusedloss::cuda::kKernels.cross_entropy, with_outputs(true), Pass::forward, outputs,
                 poison);
    cpu_.cross_entropy(with_outputs(false), Pass::forward);

    Comparison compare(what);
    const double u = rounding(acc_);
    for (std::int64_t i = 0; i < shape_.positions(); ++i) {
      const Truth& row = truth_[i];
      if (loss_) {
        const double tolerance =
            loss_tolerance(row) + rounding(case_.dtype) * std::fabs(row.loss) + smallest(case_.dtype);
        compare("loss", i, 0, loss_, i, row.counts ? row.loss : 0, row.counts ? tolerance : 0,
                row.finite || !row.counts);
      }
      if (!row.counts && !every_row()) continue;  // of no use to anyone, and left to the kernels
      if (shape_.classes == 0) continue;
      if (argmax_) compare("argmax", i, 0, argmax_, i, double(row.argmax), 0);
      if (mass_ && row.counts) compare("mass", i, 0, mass_, i, row.mass, 4 * u * row.mass);
      const double cap = 4 * u * options_.softcap + (options_.scale != 1 ? 3 * u * std::fabs(row.max) : 0);
      compare("max", i, 0, max_, i, row.max, cap, row.finite);
      const double tolerance = u * (units() + std::fabs(row.log_sum)) + cap;
      compare("log_sum", i, 0, log_sum_, i, row.log_sum, tolerance, row.finite);
      if (lse_) compare("lse", i, 0, lse_, i, row.lse, tolerance + u * std::fabs(row.lse), row.finite);
      if (entropy_) {
        // Relative: each exponential that it is added up from is off by units of its exponent's size.
        // Absolute: the sums, of which 1 is a part, are float64.
        const double tolerance = u * (units() + 64) * row.entropy + 8 * rounding(Dtype::float64);
        compare("entropy", i, 0, entropy_, i, row.entropy, tolerance, row.finite);
        compare("gap", i, 0, gap_, i, row.gap, tolerance, row.finite);
      }
    }
    check_totals(what);
  }

  // scale: of grad_loss.
  void check_gradient(const std::string& what, const Buffer& grad, double scale, bool with_lse, bool with_entropy) {
    Comparison compare(what);
    const double u = rounding(acc_), out = rounding(case_.dtype);
    for (std::int64_t i = 0; i < shape_.positions(); ++i) {
      const Truth& row = truth_[i];
      const double g = row.counts ? grad_loss_of(i) * scale * row.sample_weight : 0;
      const double from_lse = with_lse ? grad_lse_.at(i) : 0, from_entropy = with_entropy ? grad_entropy_.at(i) : 0;
      const double mass_of_all = mass_ ? mass_.at(i) : row.mass;
      const double factor = g * (mass_of_all + 2 * options_.z_loss * row.lse) + from_lse;
      const double loss_size =
          std::fabs(g) * (mass_of_all + 2 * options_.z_loss * std::fabs(row.lse)) + std::fabs(from_lse);
      const bool skipped = !row.counts && !with_lse && !with_entropy;
      for (std::int64_t c = 0; c < shape_.classes; ++c) {
        const double x = logit(i, c), a = row.counts ? mass(i, c) : 0;
        const double shifted = seen(x) - row.max, p = std::exp(shifted - row.log_sum);
        const double t = options_.softcap == 0 ? 0 : std::tanh(options_.scale * x / options_.softcap);
        const double gap = p == 0 ? 0 : std::fabs(shifted), slope = options_.scale * (1 - t) * (1 + t);
        const double own_factor = factor + from_entropy * (gap - row.gap);
        const double size = loss_size + std::fabs(from_entropy) * (gap + row.gap);
        const double truth = skipped ? 0 : (p * own_factor - g * a) * slope;
        // The exponent is off by half units of its own size, and the sum by those of the loss; then two products, a
        // difference, and the rounding of the result. Zero is exact.
        const double exponent = p == 0 ? 0 : (units() + std::fabs(shifted) + row.log_sum) * p;
        double tolerance = u * (exponent * size + 8 * (p * size + g * a));
        tolerance += out * std::fabs(truth) + smallest(case_.dtype);
        // The mean's divisor is a sum in float64, in another order here and there.
        tolerance += 4 * std::sqrt(double(shape_.positions())) * 0x1p-53 * (p * size + std::fabs(g) * a);
        // The truth is float64 as well.
        tolerance += 0x1p-50 * (1 + options_.softcap) * std::fabs(from_entropy) * p * slope;
        if (skipped) tolerance = 0;
        compare("gradient", i, c, grad, strides_.at(shape_, i, c), truth, tolerance, row.finite || skipped);
      }
    }
  }

  double grad_loss_of(std::int64_t position) const {
    return grad_loss_.at(options_.reduction == Reduction::none ? position : 0);
  }

  void forward_with_gradient() {
    // It has neither a gradient of its own for each position nor one of the lse.
    if (options_.reduction == Reduction::none || options_.is_part() || !grad_) return;
    const std::string what = what_ + ", forward_with_gradient";
    Buffer place;
    if (options_.in_place) place = Buffer(case_.dtype, logits_.count(), case_.lead);
    Buffer& grad = options_.in_place ? place : grad_;
    const auto with_outputs = [&](bool on_device) {
      CrossEntropyArgs with = args(on_device);
      with.grad_loss = {grad_loss_.data(on_device), case_.dtype, 0};
      if (options_.in_place) with.logits.data = place.data(on_device);
      with.grad_logits = strides_.tensor(grad, on_device);
      with.argmax = static_cast<std::int64_t*>(argmax_.data(on_device));
      with.every_row = options_.argmax;
      return with;
    };
    const auto poison = [&] {
      grad.poison();
      if (place) place.copy_from(logits_);
      if (argmax_) argmax_.poison();
      total_.poison();
      divisor_.poison();
    };
    launch_twice(what.c_str(), fusedloss::cuda::kKernels.cross_entropy, with_outputs(true), Pass::forward_with_gradient,
                 {&grad, &argmax_, &total_, &divisor_}, poison);
    cpu_.cross_entropy(with_outputs(false), Pass::forward_with_gradient);
    check_totals(what);
    const bool is_mean = options_.reduction == Reduction::mean;
    check_gradient(what, grad, is_mean ? 1 / counted_ : 1, false, false);
    for (std::int64_t i = 0; argmax_ && i < shape_.positions() && shape_.classes > 0; ++i) {
      Comparison compare(what);
      compare("argmax", i, 0, argmax_, i, double(truth_[i].argmax), 0);
    }
    check_gaps(what, grad, strides_, shape_);
  }

  void backward() {
    const std::string what = what_ + ", backward";
    divisor_.set(0, counted_);
    divisor_.upload();
    if (mass_) {
      for (std::int64_t i = 0; i < shape_.positions(); ++i) mass_.set(i, truth_[i].counts ? truth_[i].mass + 0.625 : 0);
      mass_.upload();
    }
    Buffer place;
    if (options_.in_place) place = Buffer(case_.dtype, logits_.count(), case_.lead);
    Buffer& grad = options_.in_place ? place : grad_;
    const bool is_mean = options_.reduction == Reduction::mean;
    const auto with_outputs = [&](bool on_device) {
      CrossEntropyArgs with = args(on_device);
      with.total = {};
      with.row_max = max_.data(on_device);
      with.row_log_sum = log_sum_.data(on_device);
      with.grad_loss = {grad_loss_.data(on_device), case_.dtype, options_.reduction == Reduction::none};
      if (is_mean) with.grad_divisor = static_cast<const double*>(divisor_.data(on_device));
      with.grad_lse = grad_lse_.data(on_device);
      with.row_gap = gap_.data(on_device);
      with.row_mass = mass_.data(on_device);
      with.grad_entropy = grad_entropy_.data(on_device);
      if (options_.in_place) with.logits.data = place.data(on_device);
      if (grad) with.grad_logits = strides_.tensor(grad, on_device);
      if (grad_probabilities_) with.grad_probabilities = probability_strides_.tensor(grad_probabilities_, on_device);
      return with;
    };
    const auto poison = [&] {
      if (grad) grad.poison();
      if (place) place.copy_from(logits_);
      if (grad_probabilities_) grad_probabilities_.poison();
    };
    launch_twice(what.c_str(), fusedloss::cuda::kKernels.cross_entropy, with_outputs(true), Pass::backward,
                 {&grad, &grad_probabilities_}, poison);
    cpu_.cross_entropy(with_outputs(false), Pass::backward);
    const double scale = is_mean ? 1 / counted_ : 1;
    if (grad) {
      check_gradient(what, grad, scale, options_.lse, options_.entropy);
      check_gaps(what, grad, strides_, shape_);
    }
    if (!grad_probabilities_) return;
    Comparison compare(what);
    const Dtype dtype = options_.probability_dtype;
    for (std::int64_t i = 0; i < shape_.positions(); ++i) {
      const Truth& row = truth_[i];
      for (std::int64_t c = 0; c < shape_.classes; ++c) {
        const double factor = grad_loss_of(i) * scale * row.sample_weight * (1 - options_.smoothing) * weight(c);
        const double entry = row.log_sum - (seen(logit(i, c)) - row.max), truth = factor * entry;
        const double tolerance =
            rounding(acc_) * std::fabs(factor) * (units() + 4 * row.log_sum + 4 * std::fabs(entry)) +
            rounding(dtype) * std::fabs(truth) + smallest(dtype);
        compare("gradient to a probability", i, c, grad_probabilities_, probability_strides_.at(shape_, i, c), truth,
                tolerance, row.finite);
      }
    }
  }

  const CpuReference& cpu_;
  const ClassCase case_;
  const ClassOptions options_;
  const std::string what_;
  const ClassShape shape_;
  const Strides strides_;
  const Dtype acc_;
  Strides probability_strides_{};
  Buffer logits_, probabilities_, index_, weight_;
  Buffer sample_weight_, denominator_;
  Buffer max_, log_sum_, lse_, entropy_, gap_, mass_, argmax_, loss_, total_, divisor_;
  Buffer grad_loss_, grad_lse_, grad_entropy_, grad_, grad_probabilities_;
  std::vector<Truth> truth_;
  double counted_ = 0;
};

// Unreduced, a row's results are the same to the bit in any batch, at any place of it, and wherever it lies in memory.
class InvarianceCheck {
 public:
  InvarianceCheck(Layout layout, Dtype dtype, std::int64_t classes, const ClassOptions& options)
      : layout_(layout), dtype_(dtype), classes_(classes), options_(options) {}

  // Columns are batches of images of `inner` positions.
  void run(std::int64_t inner) {
    ++cases();
    const bool rows = layout_ == Layout::rows;
    inner_ = inner;
    const Results all = results(rows ? 200 : ceil_200(), 0, 0, 0);
    const std::int64_t batch = all.images, width = 16 / bytes_of(dtype_);
    for (const std::int64_t first : {std::int64_t(0), std::int64_t(1), batch - 3, batch - 1}) {
      for (const std::int64_t count : {1, 3}) {
        if (first + count > batch) continue;
        for (int lead = 0; lead < width; lead += lead < 3 ? 1 : 2) {
          expect_same(all, results(count, first, lead, 0), first, lead, 0);
        }
        expect_same(all, results(count, first, 0, 1), first, 0, 1);
        expect_same(all, results(count, first, 1, 8), first, 1, 8);
      }
    }
    expect_same(all, results(batch - 1, 1, 1, 3), 1, 1, 3);
  }

 private:
  struct Results {
    std::int64_t images = 0;
    std::vector<Buffer> buffers;
  };

  std::int64_t ceil_200() const { return fusedloss::ceil_div(200, inner_) + 3; }

  double logit(std::int64_t position, std::int64_t c) const {
    Random random(position * 1000003 + c);
    random.uniform();
    return 3 * random.normal();
  }

  Results results(std::int64_t images, std::int64_t first, int lead, int pad) const {
    const ClassShape shape{images, classes_, inner_};
    const Strides strides = Strides::of(shape, layout_, pad);
    const std::int64_t positions = shape.positions();
    Buffer logits(dtype_, strides.extent(shape), lead), index(Dtype::int64, positions),
        weight(accumulate_type(dtype_), classes_);
    for (std::int64_t i = 0; i < positions; ++i) {
      const std::int64_t position = first * inner_ + i;
      for (std::int64_t c = 0; c < classes_; ++c) logits.set(strides.at(shape, i, c), logit(position, c));
      index.set(i, double(position * 7 % classes_));
    }
    for (std::int64_t c = 0; c < classes_; ++c) weight.set(c, 0.3 + double(c % 13) / 7);
    logits.upload();
    index.upload();
    weight.upload();
    Results results{images, {}};
    const Dtype acc = accumulate_type(dtype_);
    results.buffers.emplace_back(dtype_, positions);
    for (int i = 0; i < 4; ++i) results.buffers.emplace_back(acc, positions);
    CrossEntropyArgs args;
    args.shape = shape;
    args.logits = strides.tensor(logits, true);
    args.target = {{index.data(true), Dtype::int64, 1}, -100};
    if (options_.weight) args.weight = weight.data(true);
    args.label_smoothing = options_.smoothing;
    args.logit_softcap = options_.softcap;
    args.loss = {results.buffers[0].data(true), dtype_, 1};
    args.row_max = results.buffers[1].data(true);
    args.row_log_sum = results.buffers[2].data(true);
    args.lse = results.buffers[3].data(true);
    if (options_.entropy) args.entropy = results.buffers[4].data(true);
    args.every_row = true;
    launch(fusedloss::cuda::kKernels.cross_entropy, args, Pass::forward);
    for (Buffer& buffer : results.buffers) buffer.download();
    return results;
  }

  void expect_same(const Results& all, const Results& some, std::int64_t first, int lead, int pad) const {
    constexpr const char* kNames[] = {"loss", "max", "log_sum", "lse", "entropy"};
    for (std::size_t b = 0; b < all.buffers.size(); ++b) {
      const std::int64_t size = bytes_of(all.buffers[b].dtype());
      const auto& want = all.buffers[b].got_bytes();
      const auto& got = some.buffers[b].got_bytes();
      const bool same = std::equal(got.begin(), got.end(), want.begin() + first * inner_ * size);
      EXPECT(same, "%s of %ld classes, %s, %s, %ld of %ld from %ld on, lead %d, pad %d: not the same as in a batch",
             kNames[b], long(classes_), name_of(dtype_), options_.name, long(some.images), long(all.images),
             long(first), lead, pad);
    }
  }

  const Layout layout_;
  const Dtype dtype_;
  const std::int64_t classes_;
  const ClassOptions options_;
  std::int64_t inner_ = 1;
};

class NllCheck {
 public:
  NllCheck(const CpuReference& cpu, const ClassCase& c, const ClassOptions& options)
      : cpu_(cpu),
        case_(c),
        options_(options),
        what_(describe("nll", c, options)),
        shape_(c.shape),
        strides_(Strides::of(c.shape, c.layout, c.pad)),
        acc_(accumulate_type(c.dtype)) {}

  void run() {
    ++cases();
    Random random(shape_.classes + shape_.positions());
    const std::int64_t positions = shape_.positions(), classes = shape_.classes, extent = strides_.extent(shape_);
    const bool none = options_.reduction == Reduction::none, is_mean = options_.reduction == Reduction::mean;
    const std::int64_t ignore_index = options_.index == Dtype::uint8 ? 255 : -100;
    Buffer log_probs(case_.dtype, extent, case_.lead), index(options_.index, positions), weight;
    for (std::int64_t i = 0; i < positions; ++i) {
      for (std::int64_t c = 0; c < classes; ++c) log_probs.set(strides_.at(shape_, i, c), -5 * random.uniform());
      const bool ignored = options_.ignored > 0 && i % options_.ignored == options_.ignored - 1;
      const std::int64_t limit = options_.index == Dtype::uint8 ? std::min<std::int64_t>(classes, 255) : classes;
      index.set(i, double(ignored ? ignore_index : random.below(limit)));
    }
    if (options_.weight) {
      weight = Buffer(acc_, classes);
      for (std::int64_t c = 0; c < classes; ++c) weight.set(c, 0.25 + random.uniform());
      weight.upload();
    }
    log_probs.upload();
    index.upload();
    Buffer loss, total, divisor(Dtype::float64, 1), grad(case_.dtype, extent, case_.lead);
    Buffer grad_loss(case_.dtype, none ? positions : 1);
    for (std::int64_t i = 0; i < grad_loss.count(); ++i) grad_loss.set(i, 0.5 + random.uniform());
    grad_loss.upload();
    if (none) {
      loss = Buffer(case_.dtype, positions);
    } else {
      total = Buffer(case_.dtype, 1);
    }
    const auto args = [&](bool on_device) {
      NllArgs args;
      args.shape = shape_;
      args.log_probs = strides_.tensor(log_probs, on_device);
      args.target = {{index.data(on_device), options_.index, 1}, ignore_index};
      args.weight = weight.data(on_device);
      return args;
    };
    const auto forward = [&](bool on_device) {
      NllArgs with = args(on_device);
      with.loss = {loss.data(on_device), case_.dtype, 1};
      with.total = {options_.reduction, total.data(on_device), case_.dtype,
                    static_cast<double*>(divisor.data(on_device))};
      return with;
    };
    std::string what = what_ + ", forward";
    launch_twice(what.c_str(), fusedloss::cuda::kKernels.nll, forward(true), Pass::forward, {&loss, &total, &divisor},
                 [&] {
                   if (loss) loss.poison();
                   if (total) total.poison();
                   divisor.poison();
                 });
    cpu_.nll(forward(false), Pass::forward);
    Comparison compare(what);
    // A product of two: half a unit, and the rounding of the result.
    const double u = 2 * rounding(acc_), out = rounding(case_.dtype);
    double sum = 0, counted = 0;
    const auto weight_of = [&](std::int64_t i) {
      const auto c = std::int64_t(index.at(i));
      return c == ignore_index ? 0 : weight ? weight.at(c) : 1;
    };
    for (std::int64_t i = 0; i < positions; ++i) {
      const double w = weight_of(i);
      const double truth = w == 0 ? 0 : -w * log_probs.at(strides_.at(shape_, i, std::int64_t(index.at(i))));
      sum += truth;
      counted += w;
      if (loss) compare("loss", i, 0, loss, i, truth, (u + out) * truth + (w == 0 ? 0 : smallest(case_.dtype)));
    }
    compare("divisor", 0, 0, divisor, 0, counted, 1e-13 * counted);
    const double truth = is_mean ? sum / counted : sum;
    if (total) compare("total", 0, 0, total, 0, truth, (u + out + 1e-15 * std::sqrt(double(positions))) * truth);

    what = what_ + ", backward";
    divisor.set(0, counted);
    divisor.upload();
    const auto backward = [&](bool on_device) {
      NllArgs with = args(on_device);
      with.grad_loss = {grad_loss.data(on_device), case_.dtype, none};
      if (is_mean) with.grad_divisor = static_cast<const double*>(divisor.data(on_device));
      with.grad_log_probs = strides_.tensor(grad, on_device);
      return with;
    };
    launch_twice(what.c_str(), fusedloss::cuda::kKernels.nll, backward(true), Pass::backward, {&grad},
                 [&] { grad.poison(); });
    for (std::int64_t i = 0; i < positions; ++i) {  // the CPU's kernel is handed zeros
      for (std::int64_t c = 0; c < classes; ++c) grad.set(strides_.at(shape_, i, c), 0);
    }
    cpu_.nll(backward(false), Pass::backward);
    Comparison compare_grad(what);
    for (std::int64_t i = 0; i < positions; ++i) {
      const double g = grad_loss.at(none ? i : 0) / (is_mean ? counted : 1), w = weight_of(i);
      for (std::int64_t c = 0; c < classes; ++c) {
        const double entry = w != 0 && c == std::int64_t(index.at(i)) ? -w * g : 0;
        const double tolerance =
            entry == 0 ? 0
                       : (u + out + 1e-15 * std::sqrt(double(positions))) * std::fabs(entry) + smallest(case_.dtype);
        compare_grad("gradient", i, c, grad, strides_.at(shape_, i, c), entry, tolerance);
      }
    }
    check_gaps(what, grad, strides_, shape_);
  }

 private:
  const CpuReference& cpu_;
  const ClassCase case_;
  const ClassOptions options_;
  const std::string what_;
  const ClassShape shape_;
  const Strides strides_;
  const Dtype acc_;
};
