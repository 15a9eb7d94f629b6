// Binary cross entropy, on logits and on probabilities: every pass and type, operands with types, strides and
// broadcasts of their own, beside the formulas of csrc/math/bce*.h written out.

#include <cmath>
#include <memory>

#include "cases.h"
#include "judge.h"
#include "kernels/elementwise.h"
#include "run.h"

namespace check {
namespace {

using fusedloss::ElementwiseArgs;
using fusedloss::ElementwiseTensor;
using fusedloss::Pass;
using fusedloss::Reduction;

using Sizes = std::vector<std::int64_t>;

// Where an operand lies: strides for each dimension, and elements before the first.
struct Placement {
  Sizes strides;
  std::int64_t first = 0;
};

struct Shape {
  const char* name;
  Sizes sizes;  // outermost first
  Placement input, target, gradient, loss;
  Placement weight, pos_weight, flow;  // these broadcast
};

enum class Flow { absent, one, each };

struct Options {
  const char* name;
  Dtype target = Dtype::float32;  // an integer, or, standing for the input's own type, float32
  bool other_target = false;      // a floating-point type that is not the input's
  bool weighted = false;
  bool pos_weighted = false;
  bool ignores = false;
  bool in_place = false;
  bool grad_target = false;
  bool special = false;
  bool extreme = false;  // probabilities of 0 and 1, and large logits
  Flow flow = Flow::one;
  Reduction reduction = Reduction::mean;
  bool each_loss = false;
  bool other_loss = false;
};

class Operand {
 public:
  Operand(const char* name, Dtype dtype, const Sizes& sizes, const Placement& placement) : first_(placement.first) {
    std::int64_t numel = 1, expected = 1;
    for (const std::int64_t size : sizes) numel *= size;
    view_.linear = true;
    for (std::size_t d = sizes.size(); d-- > 0; expected *= sizes[d]) {
      view_.strides[d] = placement.strides[d];
      view_.linear = view_.linear && placement.strides[d] == expected;
    }
    view_.dtype = dtype;
    std::vector<std::int64_t> offsets(numel, first_);
    for (std::int64_t k = 0; k < numel; ++k) {
      std::int64_t rest = k;
      for (std::size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) offsets[k] += rest % sizes[d] * view_.strides[d];
    }
    tensor_ = std::make_unique<Tensor>(name, dtype, std::move(offsets));
  }

  Tensor& tensor() { return *tensor_; }
  const Tensor& tensor() const { return *tensor_; }
  ElementwiseTensor view(bool on_device) {
    ElementwiseTensor view = view_;
    view.data = on_device ? tensor_->on_device(first_) : tensor_->on_cpu(first_);
    return view;
  }

 private:
  ElementwiseTensor view_;
  std::int64_t first_;
  std::unique_ptr<Tensor> tensor_;
};

// One element in Real; and in `u`, half a unit in the last place of the accumulate type, what the kernels round off.
template <class Real>
struct Element {
  double u;
  Real x, t, w, p;

  static Real softplus(Real x) { return (x > 0 ? x : Real(0)) + std::log1p(std::exp(-std::fabs(x))); }
  static Real sigmoid(Real x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
  static Real at_least_minus_100(Real x) { return x < -100 ? Real(-100) : x; }
  static double size(Real x) { return std::fabs(double(x)); }

  // Two terms, each of a function of two units and a few products.
  Truth loss(bool on_logits) const {
    const Real negative = on_logits ? (1 - t) * softplus(x) : (t - 1) * at_least_minus_100(std::log1p(-x));
    const Real positive = on_logits ? p * t * softplus(-x) : -t * at_least_minus_100(std::log(x));
    return {double(w * (negative + positive)), 10 * u * size(w) * (size(negative) + size(positive))};
  }

  Truth gradient(bool on_logits, double flow) const {
    const Real factor = Real(flow) * w;
    if (on_logits) {
      const Real negative = (1 - t) * sigmoid(x), positive = p * t * sigmoid(-x);
      // The kernels know the smaller side alone, and take it from the whole of the other side's mass.
      const double smaller = size(sigmoid(-std::fabs(x))), whole = x < 0 ? size(p * t) : size(1 - t);
      return {double(factor * (negative - positive)),
              12 * u * size(factor) * (whole + smaller * (size(1 - t) + size(p * t)))};
    }
    const Real least = Real(1e-12f), variance = (1 - x) * x;
    const Real slope = (x - t) / (variance < least ? least : variance);
    return {double(factor * slope), 12 * u * size(factor * slope)};
  }

  Truth target_gradient(bool on_logits, double flow) const {
    const Real factor = Real(flow) * w;
    if (on_logits) {
      const Real weighted = p == 1 ? Real(0) : (p - 1) * softplus(-x);
      return {double(factor * (weighted - x)), 12 * u * size(factor) * (size(weighted) + size(x))};
    }
    const Real negative = std::log1p(-x), positive = std::log(x);
    return {double(factor * (negative - positive)), 12 * u * size(factor) * (size(negative) + size(positive))};
  }
};

class Test {
 public:
  Test(bool on_logits, const Shape& shape, const Options& options, Dtype dtype)
      : on_logits_(on_logits),
        shape_(shape),
        options_(options),
        dtype_(dtype),
        acc_(accumulate_type(dtype)),
        random_(std::uint64_t(shape.sizes[0]) * 31 + shape.input.first),
        input_("input", dtype, shape.sizes, shape.input),
        target_("target", target_type(options, dtype), shape.sizes, shape.target),
        weight_("weight", dtype == Dtype::float32 ? Dtype::bfloat16 : dtype, shape.sizes, shape.weight),
        pos_weight_("pos_weight", dtype, shape.sizes, shape.pos_weight),
        grad_loss_("gradient of the loss", loss_type(), shape.sizes, flow_placement()),
        loss_("loss", loss_type(), shape.sizes, shape.loss),
        gradient_("gradient", dtype, shape.sizes, shape.gradient),
        grad_target_("gradient of the target", target_type(options, dtype), shape.sizes, shape.target),
        total_("total", loss_type(), in_a_row(1)),
        divisor_("divisor", Dtype::float64, in_a_row(1)) {
    make_inputs();
  }

  void run() {
    const Reduction reduction = options_.reduction;
    std::vector<Tensor*> tensors = inputs(), outputs{&divisor_};
    if (writes_each_loss()) outputs.push_back(&loss_.tensor());
    if (reduction != Reduction::none) outputs.push_back(&total_);
    run_both(Pass::forward, outputs, [](ElementwiseArgs&, bool) {});
    judge_losses("forward", true);

    divisor_.becomes_input();
    outputs = {&gradient_tensor()};
    gradient_tensor().takes_role(options_.in_place ? Role::in_place : Role::output);
    if (options_.grad_target) outputs.push_back(&grad_target_.tensor());
    run_both(Pass::backward, outputs, [&](ElementwiseArgs& args, bool on_device) {
      if (reduction == Reduction::mean) {
        args.flow.divisor = static_cast<const double*>(on_device ? divisor_.on_device() : divisor_.on_cpu());
      }
      args.grad_input = (options_.in_place ? input_ : gradient_).view(on_device);
      if (options_.grad_target) args.grad_target = grad_target_.view(on_device);
      args.total = {};
      args.loss = {};
    });
    judge_gradients("backward", options_.grad_target);

    if (reduction == Reduction::none || options_.flow == Flow::each) return;
    outputs = {&total_, &gradient_tensor()};
    total_.takes_role(Role::output);
    run_both(Pass::forward_with_gradient, outputs, [&](ElementwiseArgs& args, bool on_device) {
      args.grad_input = (options_.in_place ? input_ : gradient_).view(on_device);
      args.total.divisor = nullptr;
      args.loss = {};
    });
    judge_losses("forward with gradient", false);
    judge_gradients("forward with gradient", false);
  }

 private:
  static Dtype target_type(const Options& options, Dtype dtype) {
    if (options.target != Dtype::float32) return options.target;
    if (!options.other_target) return dtype;
    return dtype == Dtype::float32 ? Dtype::float16 : Dtype::float32;
  }

  Dtype loss_type() const {
    if (!options_.other_loss) return acc_;
    return dtype_ == acc_ ? Dtype::bfloat16 : dtype_;
  }

  Placement flow_placement() const {
    return options_.flow == Flow::each ? shape_.flow : Placement{Sizes(shape_.sizes.size(), 0), 0};
  }

  bool writes_each_loss() const { return options_.reduction == Reduction::none || options_.each_loss; }
  Tensor& gradient_tensor() { return (options_.in_place ? input_ : gradient_).tensor(); }
  std::int64_t numel() const { return input_.tensor().size(); }
  double ignore_index() const { return target_.tensor().dtype() == Dtype::uint8 ? 255 : -100; }
  bool is_ignored(std::int64_t k) const { return options_.ignores && t_[k] == ignore_index(); }

  void make_inputs() {
    const bool is_integer = options_.target != Dtype::float32;
    const std::int64_t count = numel();
    const double extremes_of_logits[] = {0, 90, -90, 20, -20, 1e-3},
                 extremes_of_probabilities[] = {0, 1, 0, 1, 1e-4, 0.5};
    const double infinity = std::numeric_limits<double>::infinity();
    for (std::int64_t k = 0; k < count; ++k) {
      double x = on_logits_ ? 3 * random_.bell() : random_.uniform(), t = random_.uniform();
      if (options_.extreme && k % 3 == 0) x = (on_logits_ ? extremes_of_logits : extremes_of_probabilities)[k / 3 % 6];
      if (options_.special && on_logits_ && k % 5 == 0) {
        const double values[] = {infinity, -infinity, std::numeric_limits<double>::quiet_NaN()};
        x = values[k / 5 % 3];
      }
      if (is_integer || (options_.extreme && k % 2 == 0)) t = t < 0.5 ? 0 : 1;
      if (options_.ignores && (k % 7 == 2 || k % 7 == 3)) t = ignore_index();
      input_.tensor().set(k, x);
      target_.tensor().set(k, t);
      weight_.tensor().set(k, 0.5 + random_.uniform());
      pos_weight_.tensor().set(k, 1 + random_.below(4));
      grad_loss_.tensor().set(k, 0.5 + random_.uniform());
    }
    for (Tensor* tensor : inputs()) tensor->upload();
    // Broadcast elements have been set more than once: the last value counts.
    for (std::int64_t k = 0; k < count; ++k) {
      x_.push_back(input_.tensor().of_cpu(k));
      t_.push_back(target_.tensor().of_cpu(k));
      counted_ += !is_ignored(k);
    }
  }

  std::vector<Tensor*> inputs() {
    return {&input_.tensor(), &target_.tensor(), &weight_.tensor(), &pos_weight_.tensor(), &grad_loss_.tensor()};
  }

  template <class F>
  void run_both(Pass pass, const std::vector<Tensor*>& outputs, F complete) {
    std::vector<Tensor*> tensors = inputs();
    for (Tensor* tensor : inputs()) {
      const bool in_place = pass != Pass::forward && options_.in_place && tensor == &input_.tensor();
      tensor->takes_role(in_place ? Role::in_place : Role::input);
    }
    for (Tensor* tensor : outputs) {
      if (tensor != &input_.tensor()) tensors.push_back(tensor);
    }
    if (pass == Pass::backward) tensors.push_back(&divisor_);
    const auto arguments = [&](bool on_device) {
      ElementwiseArgs args;
      args.shape.dims = static_cast<int>(shape_.sizes.size());
      args.shape.numel = numel();
      std::copy(shape_.sizes.begin(), shape_.sizes.end(), args.shape.sizes.begin());
      args.dtype = dtype_;
      args.input = input_.view(on_device);
      args.target = target_.view(on_device);
      if (options_.weighted) args.weight = weight_.view(on_device);
      if (options_.pos_weighted && on_logits_) args.pos_weight = pos_weight_.view(on_device);
      args.has_ignore_index = options_.ignores;
      args.ignore_index = static_cast<std::int64_t>(ignore_index());
      if (writes_each_loss()) args.loss = loss_.view(on_device);
      const auto place = [&](Tensor& tensor) { return on_device ? tensor.on_device() : tensor.on_cpu(); };
      args.total = {options_.reduction, options_.reduction == Reduction::none ? nullptr : place(total_), total_.dtype(),
                    static_cast<double*>(place(divisor_))};
      if (pass != Pass::forward && options_.flow != Flow::absent) args.flow.grad_loss = grad_loss_.view(on_device);
      complete(args, on_device);
      return args;
    };
    if (on_logits_) {
      run_cpu(&fusedloss::cpu::Kernels::bce_with_logits, pass, arguments(false), tensors);
      run_device(fusedloss::cuda::kKernels.bce_with_logits, pass, arguments(true), tensors);
    } else {
      run_cpu(&fusedloss::cpu::Kernels::bce, pass, arguments(false), tensors);
      run_device(fusedloss::cuda::kKernels.bce, pass, arguments(true), tensors);
    }
  }

  template <class F>
  Truth with_element(std::int64_t k, F body) const {
    const double w = options_.weighted ? weight_.tensor().of_cpu(k) : 1;
    const double p = options_.pos_weighted && on_logits_ ? pos_weight_.tensor().of_cpu(k) : 1;
    if (is_ignored(k)) return {};
    if (dtype_ == Dtype::float64) return body(Element<long double>{unit(acc_), x_[k], t_[k], w, p});
    return body(Element<double>{unit(acc_), x_[k], t_[k], w, p});
  }

  void judge_losses(const char* pass, bool is_forward) {
    Truth total;
    for (std::int64_t k = 0; k < numel(); ++k) {
      const Truth loss = with_element(k, [&](const auto& element) { return element.loss(on_logits_); });
      total.value += loss.value;
      // Losses are added in the accumulate type, some dozens of them, before float64 takes over.
      total.tolerance += loss.tolerance + 24 * unit(acc_) * std::fabs(loss.value);
      if (is_forward && writes_each_loss()) judge(pass, loss_.tensor(), k, loss);
    }
    if (is_forward) judge(pass, divisor_, 0, {double(counted_), 0});
    if (options_.reduction == Reduction::none) return;
    if (options_.reduction == Reduction::mean) {
      total = {total.value / double(counted_), total.tolerance / double(counted_)};
    }
    judge(pass, total_, 0, total);
  }

  void judge_gradients(const char* pass, bool with_target) {
    const double scale = options_.reduction == Reduction::mean ? 1 / double(counted_) : 1;
    for (std::int64_t k = 0; k < numel(); ++k) {
      const double flow = options_.flow == Flow::absent ? scale : scale * grad_loss_.tensor().of_cpu(k);
      if (is_ignored(k)) {
        EXPECT(gradient_tensor().of_device(k) == 0, "%s: element %ld is ignored and has the gradient %g", pass, long(k),
               gradient_tensor().of_device(k));
      }
      judge(pass, gradient_tensor(), k,
            with_element(k, [&](const auto& element) { return element.gradient(on_logits_, flow); }));
      if (!with_target) continue;
      judge(pass, grad_target_.tensor(), k,
            with_element(k, [&](const auto& element) { return element.target_gradient(on_logits_, flow); }));
    }
  }

  const bool on_logits_;
  const Shape shape_;
  const Options options_;
  const Dtype dtype_, acc_;
  Random random_;
  Operand input_, target_, weight_, pos_weight_, grad_loss_, loss_, gradient_, grad_target_;
  Tensor total_, divisor_;
  std::vector<double> x_, t_;
  std::int64_t counted_ = 0;
};

// --- The table ----------------------------------------------------------------------------------------------------

const std::vector<Options>& all_options() {
  static const std::vector<Options> table{
      {.name = "plain"},
      {.name = "each loss", .flow = Flow::each, .reduction = Reduction::none},
      {.name = "uint8 target, pos_weight, ignored", .target = Dtype::uint8, .pos_weighted = true, .ignores = true},
      {.name = "int64 target, weight",
       .target = Dtype::int64,
       .weighted = true,
       .reduction = Reduction::sum,
       .each_loss = true,
       .other_loss = true},
      {.name = "int8 target, in place", .target = Dtype::int8, .ignores = true, .in_place = true},
      {.name = "int16 target", .target = Dtype::int16, .flow = Flow::absent, .reduction = Reduction::sum},
      {.name = "int32 target", .target = Dtype::int32, .flow = Flow::each, .reduction = Reduction::none},
      {.name = "another type of target",
       .other_target = true,
       .weighted = true,
       .pos_weighted = true,
       .grad_target = true,
       .other_loss = true},
      {.name = "gradient of the target",
       .pos_weighted = true,
       .grad_target = true,
       .flow = Flow::each,
       .reduction = Reduction::none},
      {.name = "in place", .in_place = true, .each_loss = true},
      {.name = "in place, ignored", .ignores = true, .in_place = true, .flow = Flow::absent},
      {.name = "ignored", .ignores = true, .other_loss = true},
      {.name = "extreme", .weighted = true, .grad_target = true, .extreme = true, .reduction = Reduction::sum},
      {.name = "extreme, plain", .extreme = true, .each_loss = true},
      {.name = "special", .pos_weighted = true, .special = true, .reduction = Reduction::none},
      {.name = "special, plain", .ignores = true, .special = true, .each_loss = true},
  };
  return table;
}

Sizes contiguous(const Sizes& sizes) {
  Sizes strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return strides;
}

// In one piece, with all operands at these offsets; weights broadcast along the first dimension, or are one number.
Shape in_one_piece(const char* name, Sizes sizes, std::int64_t input, std::int64_t target, std::int64_t gradient) {
  const Sizes strides = contiguous(sizes);
  Sizes columns = strides, none(sizes.size(), 0);
  columns[0] = 0;
  return {name,      sizes,        {strides, input}, {strides, target}, {strides, gradient}, {strides, gradient},
          {none, 0}, {columns, 1}, {strides, 1}};
}

std::vector<Shape> shapes(Level level) {
  std::vector<Shape> result;
  std::vector<std::int64_t> lengths{1, 7, 1000};
  if (level == Level::full) lengths = {1, 7, 33, 1000, 1024, 16385, 700001};
  for (const std::int64_t length : lengths) {
    result.push_back(in_one_piece("aligned", {length}, 0, 0, 0));
    result.push_back(in_one_piece("all one element on", {length}, 1, 1, 1));
    result.push_back(in_one_piece("apart", {length}, 1, 2, 3));
  }
  const std::int64_t rows = level == Level::full ? 257 : 17, columns = level == Level::full ? 129 : 33;
  result.push_back(in_one_piece("rows", {rows, columns}, 0, 1, 0));
  // Rows of a larger tensor; weights for each row; a gradient that flows in by columns.
  result.push_back({"rows with gaps",
                    {rows, columns},
                    {{columns + 3, 1}, 1},
                    {{columns, 1}, 0},
                    {{columns + 5, 1}, 2},
                    {{columns, 1}, 1},
                    {{1, 0}, 0},
                    {{0, 1}, 0},
                    {{0, 1}, 0}});
  // A transposed target; weights of its middle dimension.
  result.push_back({"transposed",
                    {5, rows, 4},
                    {{rows * 4, 4, 1}, 0},
                    {{4, 20, 1}, 1},
                    {{rows * 4, 4, 1}, 0},
                    {{1, 20, 5}, 0},
                    {{0, 1, 0}, 0},
                    {{1, 0, 0}, 0},
                    {{1, 0, 7}, 0}});
  result.push_back({"every other",
                    {columns, 3},
                    {{6, 2}, 1},
                    {{6, 2}, 0},
                    {{3, 1}, 0},
                    {{6, 2}, 0},
                    {{0, 0}, 0},
                    {{0, 1}, 0},
                    {{3, 1}, 0}});
  result.push_back(in_one_piece("nothing", {0}, 0, 0, 0));
  return result;
}

}  // namespace

void add_elementwise(std::vector<Case>& cases, const Selection& selection) {
  int turn = selection.rotation;
  for (const bool on_logits : {true, false}) {
    for (const Shape& shape : shapes(selection.level)) {
      std::int64_t numel = 1;
      for (const std::int64_t size : shape.sizes) numel *= size;
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64}) {
        const int step = selection.level == Level::small ? 13 : numel > 100000 ? 5 : 1;
        turn += 1;
        for (int i = turn % step; i < int(all_options().size()); i += step) {
          const Options& o = all_options()[i];
          if (o.special && !on_logits) continue;
          if (o.in_place &&
              (shape.gradient.strides != shape.input.strides || shape.gradient.first != shape.input.first)) {
            continue;
          }
          const std::string size = std::to_string(numel) + " " + shape.name;
          cases.push_back(
              {std::string(on_logits ? "bce with logits, " : "bce, ") + name_of(dtype) + ", " + size + ", " + o.name,
               [=] { Test(on_logits, shape, o, dtype).run(); }});
        }
      }
    }
  }
}

}  // namespace check
