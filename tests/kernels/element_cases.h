// Losses of one element: a case is a shape, element types and options; it runs every pass. The truth is the definition
// in csrc/math/bce_with_logits.h and csrc/math/bce.h, written out in double precision.

#pragma once

#include <string>

#include "class_cases.h"

using fusedloss::ElementwiseArgs;
using fusedloss::ElementwiseTensor;

enum class Weight { none, of_columns, of_rows, of_elements, one };

struct ElementOptions {
  const char* name;
  Reduction reduction = Reduction::mean;
  bool other_target = false;  // of the type below, where it is not the input's
  Dtype target_dtype = Dtype::float32;
  int ignored = 0;  // one in so many; 1: all
  Weight weight = Weight::none;
  Weight pos_weight = Weight::none;
  bool accumulated_weights = false;  // of the accumulate type
  bool gaps_in_input = false;
  bool gaps_in_target = false;
  bool grad_target = false;
  bool one_grad_loss = false;  // an expanded gradient, where the loss is not reduced
  bool in_place = false;
};

struct ElementCase {
  std::int64_t rows, columns;
  Dtype dtype;
  int lead = 0;         // elements before the input, what lies beside each of its elements, and the gradient
  int target_lead = 0;  // before the target
};

class ElementCheck {
 public:
  ElementCheck(const CpuReference& cpu, bool with_logits, const ElementCase& c, const ElementOptions& options)
      : cpu_(with_logits ? cpu.bce_with_logits : cpu.bce),
        loss_of_(with_logits ? fusedloss::cuda::kKernels.bce_with_logits : fusedloss::cuda::kKernels.bce),
        with_logits_(with_logits),
        case_(c),
        options_(options),
        acc_(accumulate_type(c.dtype)),
        count_(c.rows * c.columns) {
    char text[200];
    std::snprintf(text, sizeof(text), "%s (%ld, %ld) %s lead %d %d, %s", with_logits ? "bce_with_logits" : "bce",
                  long(c.rows), long(c.columns), name_of(c.dtype), c.lead, c.target_lead, options.name);
    what_ = text;
    fill();
  }

  void run() {
    ++cases();
    forward();
    if (options_.reduction != Reduction::none && !options_.grad_target) forward_with_gradient();
    backward();
  }

 private:
  // Strides (rows, columns), and how many elements lie between the first and the last.
  struct View {
    Buffer buffer;
    std::int64_t row_stride = 0, column_stride = 0;
    bool linear = false;
  };

  View make(Dtype dtype, std::int64_t row_stride, std::int64_t column_stride, int lead = 0) {
    const std::int64_t extent =
        count_ == 0 ? 0 : 1 + (case_.rows - 1) * row_stride + (case_.columns - 1) * column_stride;
    return {Buffer(dtype, extent, lead), row_stride, column_stride, row_stride == case_.columns && column_stride == 1};
  }
  View make_linear(Dtype dtype, int lead = 0) { return make(dtype, case_.columns, 1, lead); }
  View make_weight(Weight weight, Random& random) {
    View view;
    const Dtype dtype = options_.accumulated_weights ? acc_ : case_.dtype;
    switch (weight) {
      case Weight::none: return view;
      case Weight::of_columns: view = make(dtype, 0, 1); break;
      case Weight::of_rows: view = make(dtype, 1, 0); break;
      case Weight::of_elements: view = make_linear(dtype, case_.lead); break;
      case Weight::one: view = make(dtype, 0, 0); break;
    }
    for (std::int64_t i = 0; i < view.buffer.count(); ++i) view.buffer.set(i, 0.5 + random.uniform());
    view.buffer.upload();
    return view;
  }

  std::int64_t place(const View& view, std::int64_t e) const {
    return e / case_.columns * view.row_stride + e % case_.columns * view.column_stride;
  }
  double at(const View& view, std::int64_t e) const { return view.buffer ? view.buffer.at(place(view, e)) : 1; }

  ElementwiseTensor tensor(const View& view, bool on_device) const {
    ElementwiseTensor tensor;
    if (!view.buffer) return tensor;
    tensor.data = view.buffer.data(on_device);
    tensor.dtype = view.buffer.dtype();
    tensor.linear = view.linear;
    tensor.strides = {view.row_stride, view.column_stride};
    return tensor;
  }

  bool ignores() const { return options_.ignored > 0; }
  std::int64_t ignore_index() const { return target_.buffer.dtype() == Dtype::uint8 ? 255 : -100; }
  bool counts(std::int64_t e) const { return !ignores() || at(target_, e) != double(ignore_index()); }

  void fill() {
    Random random(count_ + 77 * int(case_.dtype) + case_.lead);
    input_ = options_.gaps_in_input ? make(case_.dtype, 2 * case_.columns + 1, 2, case_.lead)
                                    : make_linear(case_.dtype, case_.lead);
    const Dtype target = options_.other_target ? options_.target_dtype : case_.dtype;
    // A target that lies the other way round.
    target_ = options_.gaps_in_target ? make(target, 1, case_.rows, case_.target_lead)
                                      : make_linear(target, case_.target_lead);
    for (std::int64_t e = 0; e < count_; ++e) {
      double x = with_logits_ ? 6 * random.normal() : random.uniform();
      if (e % 11 == 3) x = with_logits_ ? 0 : 1;
      if (e % 11 == 7) x = with_logits_ ? -90 : 0;
      input_.buffer.set(place(input_, e), x);
      double t = is_floating(target) ? random.uniform() : double(random.below(2));
      if (e % 13 == 5) t = 0;
      if (e % 13 == 6) t = 1;
      if (ignores() && e % options_.ignored == options_.ignored - 1) t = double(ignore_index());
      target_.buffer.set(place(target_, e), t);
    }
    input_.buffer.upload();
    target_.buffer.upload();
    weight_ = make_weight(options_.weight, random);
    if (with_logits_) pos_weight_ = make_weight(options_.pos_weight, random);
    const bool none = options_.reduction == Reduction::none;
    if (none) {
      loss_ = make_linear(case_.dtype, case_.lead);
    } else {
      total_ = Buffer(case_.dtype, 1);
    }
    divisor_ = Buffer(Dtype::float64, 1);
    grad_loss_ = none && !options_.one_grad_loss ? make_linear(case_.dtype, case_.lead) : make(case_.dtype, 0, 0);
    for (std::int64_t i = 0; i < grad_loss_.buffer.count(); ++i) grad_loss_.buffer.set(i, 0.5 + random.uniform());
    grad_loss_.buffer.upload();
    grad_ = options_.gaps_in_input ? make(case_.dtype, 2 * case_.columns + 1, 2, case_.lead)
                                   : make_linear(case_.dtype, case_.lead);
    if (options_.grad_target) {
      grad_target_ = options_.gaps_in_target ? make(target, 1, case_.rows) : make_linear(target);
    }
    for (std::int64_t e = 0; e < count_; ++e) counted_ += counts(e);
  }

  ElementwiseArgs args(bool on_device) const {
    ElementwiseArgs args;
    args.shape.dims = 2;
    args.shape.numel = count_;
    args.shape.sizes = {case_.rows, case_.columns};
    args.dtype = case_.dtype;
    args.input = tensor(input_, on_device);
    args.target = tensor(target_, on_device);
    args.weight = tensor(weight_, on_device);
    args.pos_weight = tensor(pos_weight_, on_device);
    args.has_ignore_index = ignores();
    args.ignore_index = ignore_index();
    args.total = {options_.reduction, total_.data(on_device), case_.dtype,
                  static_cast<double*>(divisor_.data(on_device))};
    return args;
  }

  struct Answer {
    double value;
    double size;  // the sum of the magnitudes of what the value is the sum of
  };

  static double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
  static double clamped(double logarithm) { return std::max(logarithm, -100.0); }

  Answer loss_of(std::int64_t e) const {
    const double x = at(input_, e), t = at(target_, e), w = at(weight_, e), p = at(pos_weight_, e);
    if (!counts(e)) return {0, 0};
    const double negative = with_logits_ ? (1 - t) * softplus(x) : (t - 1) * clamped(std::log1p(-x));
    const double positive = with_logits_ ? p * t * softplus(-x) : -t * clamped(std::log(x));
    return {w * (negative + positive), w * (std::fabs(negative) + std::fabs(positive))};
  }

  Answer slope_of(std::int64_t e) const {
    const double x = at(input_, e), t = at(target_, e), w = at(weight_, e), p = at(pos_weight_, e);
    if (!counts(e)) return {0, 0};
    if (with_logits_) {
      const double slope = (1 - t) / (1 + std::exp(-x)) - p * t / (1 + std::exp(x));
      return {w * slope, w * (std::fabs(1 - t) + p * std::fabs(t))};
    }
    const double variance = std::max((1 - x) * x, double(1e-12f));
    return {w * (x - t) / variance, w * (x + std::fabs(t)) / variance};
  }

  Answer target_slope_of(std::int64_t e) const {
    const double x = at(input_, e), w = at(weight_, e), p = at(pos_weight_, e);
    if (!counts(e)) return {0, 0};
    if (with_logits_) {
      return {w * ((p - 1) * softplus(-x) - x), w * (std::fabs(p - 1) * softplus(-x) + std::fabs(x))};
    }
    return {w * (std::log1p(-x) - std::log(x)), w * (std::fabs(std::log1p(-x)) + std::fabs(std::log(x)))};
  }

  // A handful of elementary functions, each off by a unit or two, and as many products and sums. Half precision has
  // functions of its own, off by more.
  double functions() const { return (rounding(case_.dtype) > rounding(Dtype::float32) ? 60 : 12) * rounding(acc_); }

  double tolerance(const Answer& answer, double factor, Dtype out) const {
    if (answer.size == 0) return 0;
    // Where an answer is infinite both sides are, and the tolerance must be a number.
    const double size = std::isinf(answer.size) ? 0 : answer.size, value = std::isinf(answer.value) ? 0 : answer.value;
    return factor * (functions() * size + rounding(out) * std::fabs(value)) + smallest(out) + smallest(acc_);
  }

  void check_totals(const std::string& what) {
    Comparison compare(what);
    compare("divisor", 0, 0, divisor_, 0, counted_, 0);
    if (!total_) return;
    long double sum = 0;
    double lost = 0;
    for (std::int64_t e = 0; e < count_; ++e) {
      const Answer loss = loss_of(e);
      sum += loss.value;
      // Up to 16 packets are added up in the accumulate type, and all of them in float64.
      lost += (16 * rounding(acc_) + functions() + std::sqrt(double(count_)) * 0x1p-53) * loss.size;
    }
    const double scale = options_.reduction == Reduction::mean ? 1 / counted_ : 1;
    const double truth = static_cast<double>(sum) * scale;
    compare("total", 0, 0, total_, 0, truth,
            scale * lost + rounding(case_.dtype) * std::fabs(truth) + smallest(case_.dtype));
  }

  void forward() {
    const std::string what = what_ + ", forward";
    const auto with_outputs = [&](bool on_device) {
      ElementwiseArgs with = args(on_device);
      with.loss = tensor(loss_, on_device);
      return with;
    };
    launch_twice(what.c_str(), loss_of_, with_outputs(true), Pass::forward, {&loss_.buffer, &total_, &divisor_}, [&] {
      if (loss_.buffer) loss_.buffer.poison();
      if (total_) total_.poison();
      divisor_.poison();
    });
    cpu_(with_outputs(false), Pass::forward);
    Comparison compare(what);
    for (std::int64_t e = 0; loss_.buffer && e < count_; ++e) {
      const Answer loss = loss_of(e);
      compare("loss", e, 0, loss_.buffer, e, loss.value, tolerance(loss, 1, case_.dtype));
    }
    check_totals(what);
  }

  void check_gradient(const std::string& what, const View& grad, double scale) {
    Comparison compare(what);
    for (std::int64_t e = 0; e < count_; ++e) {
      const Answer slope = slope_of(e);
      const double grad_loss = at(grad_loss_, e) * scale;
      compare("gradient", e, 0, grad.buffer, place(grad, e), grad_loss * slope.value,
              tolerance(slope, grad_loss, case_.dtype));
    }
    bool untouched = grad.buffer.lead_is_poison();
    if (options_.gaps_in_input) {
      std::vector<char> is_element(grad.buffer.count(), 0);
      for (std::int64_t e = 0; e < count_; ++e) is_element[place(grad, e)] = 1;
      for (std::int64_t i = 0; i < grad.buffer.count(); ++i) {
        untouched = untouched && (is_element[i] || grad.buffer.is_poison(i));
      }
    }
    EXPECT(untouched || options_.in_place, "%s: written beside the gradient", what.c_str());
  }

  double mean_scale() const { return options_.reduction == Reduction::mean ? 1 / counted_ : 1; }

  void forward_with_gradient() {
    const std::string what = what_ + ", forward_with_gradient";
    View place;
    if (options_.in_place) {
      place = View{Buffer(case_.dtype, input_.buffer.count(), case_.lead), input_.row_stride, input_.column_stride,
                   input_.linear};
    }
    View& grad = options_.in_place ? place : grad_;
    const auto with_outputs = [&](bool on_device) {
      ElementwiseArgs with = args(on_device);
      with.grad_loss = tensor(grad_loss_, on_device);
      if (options_.in_place) with.input.data = place.buffer.data(on_device);
      with.grad_input = tensor(grad, on_device);
      return with;
    };
    launch_twice(what.c_str(), loss_of_, with_outputs(true), Pass::forward_with_gradient,
                 {&grad.buffer, &total_, &divisor_}, [&] {
                   grad.buffer.poison();
                   if (options_.in_place) place.buffer.copy_from(input_.buffer);
                   total_.poison();
                   divisor_.poison();
                 });
    cpu_(with_outputs(false), Pass::forward_with_gradient);
    check_totals(what);
    check_gradient(what, grad, mean_scale());
  }

  void backward() {
    const std::string what = what_ + ", backward";
    divisor_.set(0, counted_);
    divisor_.upload();
    const auto with_outputs = [&](bool on_device) {
      ElementwiseArgs with = args(on_device);
      with.total = {};
      with.grad_loss = tensor(grad_loss_, on_device);
      if (options_.reduction == Reduction::mean) {
        with.grad_divisor = static_cast<const double*>(divisor_.data(on_device));
      }
      with.grad_input = tensor(grad_, on_device);
      with.grad_target = tensor(grad_target_, on_device);
      return with;
    };
    launch_twice(what.c_str(), loss_of_, with_outputs(true), Pass::backward, {&grad_.buffer, &grad_target_.buffer},
                 [&] {
                   grad_.buffer.poison();
                   if (grad_target_.buffer) grad_target_.buffer.poison();
                 });
    cpu_(with_outputs(false), Pass::backward);
    check_gradient(what, grad_, mean_scale());
    if (!grad_target_.buffer) return;
    Comparison compare(what);
    for (std::int64_t e = 0; e < count_; ++e) {
      const Answer slope = target_slope_of(e);
      const double grad_loss = at(grad_loss_, e) * mean_scale();
      compare("gradient to the target", e, 0, grad_target_.buffer, place(grad_target_, e), grad_loss * slope.value,
              tolerance(slope, grad_loss, grad_target_.buffer.dtype()));
    }
  }

  const ReferenceLoss<ElementwiseArgs> cpu_;
  const fusedloss::cuda::Loss<ElementwiseArgs>& loss_of_;
  const bool with_logits_;
  const ElementCase case_;
  const ElementOptions options_;
  const Dtype acc_;
  const std::int64_t count_;
  std::string what_;
  View input_, target_, weight_, pos_weight_, loss_, grad_loss_, grad_, grad_target_;
  Buffer total_, divisor_;
  double counted_ = 0;
};

// A gradient that was written for one number, made one for another.
inline void check_rescale(Dtype dtype, std::int64_t count, int lead, double scale, double grad_output,
                          bool keep_zeros = false) {
  ++cases();
  char what[128];
  std::snprintf(what, sizeof(what), "rescale %ld %s lead %d, from %g to %g%s", long(count), name_of(dtype), lead, scale,
                grad_output, keep_zeros ? ", zeros kept" : "");
  Random random(count);
  const Dtype grad_output_dtype = accumulate_type(dtype);
  Buffer grad(dtype, count, lead), grad_output_buffer(grad_output_dtype, 1), from(Dtype::float64, 1);
  for (std::int64_t i = 0; i < count; ++i) grad.set(i, i % 3 == 0 ? 0 : random.normal());
  grad.upload();
  grad_output_buffer.set(0, grad_output);
  grad_output_buffer.upload();
  from.set(0, scale);
  from.upload();
  fusedloss::cuda::RescaleArgs args{.grad = grad.data(true),
                                    .dtype = dtype,
                                    .numel = count,
                                    .grad_output = grad_output_buffer.data(true),
                                    .grad_output_dtype = grad_output_dtype,
                                    .scale = scale == 1 ? nullptr : static_cast<const double*>(from.data(true)),
                                    .keep_zeros = keep_zeros};
  fusedloss::cuda::rescale(args, nullptr);
  require(cudaDeviceSynchronize(), "rescale");
  grad.download();
  const double factor = grad_output_buffer.at(0) / from.at(0);
  for (std::int64_t i = 0; i < count; ++i) {
    const double truth = keep_zeros && grad.at(i) == 0 ? 0 : grad.at(i) * factor;
    const double tolerance =
        factor == 1 ? 0 : (2 * rounding(grad_output_dtype) + rounding(dtype)) * std::fabs(truth) + smallest(dtype);
    EXPECT(agree(grad.got(i), truth, tolerance), "%s: element %ld: %.9g, truth %.9g", what, long(i), grad.got(i),
           truth);
  }
  EXPECT(grad.lead_is_poison() || lead == 0, "%s: written before the gradient", what);
}
