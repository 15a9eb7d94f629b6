// Negative log likelihood: loss and gradient have one term, so that it is all about what is read and written where.

#include <cmath>

#include "cases.h"
#include "class_tensors.h"
#include "judge.h"
#include "run.h"

namespace check {
namespace {

using fusedloss::NllArgs;
using fusedloss::Pass;
using fusedloss::Reduction;

struct Shape {
  std::int64_t outer, classes, inner;
  Placement log_probs;
  Placement gradient = log_probs;
};

struct Options {
  const char* name;
  Dtype index = Dtype::int64;
  Ignored ignored = Ignored::some;
  bool weighted = false;
  Flow flow = Flow::one;
  Reduction reduction = Reduction::mean;
  bool other_loss = false;
  bool special = false;
};

class Test {
 public:
  Test(const Shape& shape, const Options& options, Dtype dtype)
      : options_(options),
        shape_{shape.outer, shape.classes, shape.inner},
        random_(shape.classes * 7919 + shape.inner),
        log_probs_("log-probabilities", dtype, shape_, shape.log_probs),
        gradient_("gradient", dtype, shape_, shape.gradient) {
    const Dtype acc = accumulate_type(dtype);
    u_ = unit(acc);
    const std::int64_t positions = shape_.positions();
    const Dtype loss_type = options.other_loss ? (dtype == acc ? Dtype::bfloat16 : dtype) : acc;
    targets_ = one_each("targets", options.index, positions);
    weight_ = one_each("weight", acc, shape.classes);
    loss_ = one_each("loss", loss_type, positions);
    total_ = one_each("total", loss_type, 1);
    divisor_ = one_each("divisor", Dtype::float64, 1);
    grad_loss_ = one_each("gradient of the loss", loss_type, options.flow == Flow::each ? positions : 1);

    Tensor& log_probs = log_probs_.tensor();
    for (std::int64_t k = 0; k < log_probs.size(); ++k) log_probs.set(k, -10 * random_.uniform());
    classes_ = random_targets(random_, positions, shape.classes, options.index, options.ignored);
    for (std::int64_t i = 0; options.special && i < positions; i += 3) {
      const double values[] = {-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()};
      if (classes_[i] >= 0) log_probs.set(i * shape.classes + classes_[i], values[i % 2]);
    }
    for (std::int64_t i = 0; i < positions; ++i) {
      targets_->set(i, double(classes_[i] < 0 ? ignore_index_of(options.index) : classes_[i]));
    }
    for (std::int64_t c = 0; c < shape.classes; ++c) weight_->set(c, c % 5 == 3 ? 0 : 0.5 + random_.uniform());
    for (std::int64_t k = 0; k < grad_loss_->size(); ++k) grad_loss_->set(k, 0.5 + random_.uniform());
    inputs_ = {&log_probs, targets_.get(), weight_.get(), grad_loss_.get()};
    for (Tensor* tensor : inputs_) {
      tensor->takes_role(Role::input);
      tensor->upload();
    }
  }

  void run() {
    std::vector<Tensor*> tensors = inputs_;
    tensors.push_back(divisor_.get());
    tensors.push_back(options_.reduction == Reduction::none ? loss_.get() : total_.get());
    run_cpu(&fusedloss::cpu::Kernels::nll, Pass::forward, arguments(false), tensors);
    run_device(fusedloss::cuda::kKernels.nll, Pass::forward, arguments(true), tensors);
    judge_forward();

    divisor_->becomes_input();
    tensors = inputs_;
    tensors.push_back(divisor_.get());
    tensors.push_back(&gradient_.tensor());
    run_cpu(&fusedloss::cpu::Kernels::nll, Pass::backward, arguments(false), tensors, /*fill=*/0);
    run_device(fusedloss::cuda::kKernels.nll, Pass::backward, arguments(true), tensors);
    judge_backward();
  }

 private:
  NllArgs arguments(bool on_device) {
    const auto place = [&](Tensor& tensor) { return on_device ? tensor.on_device() : tensor.on_cpu(); };
    NllArgs args;
    args.shape = shape_;
    args.log_probs = on_device ? log_probs_.on_device() : log_probs_.on_cpu();
    args.target = {{place(*targets_), options_.index, 1}, ignore_index_of(options_.index)};
    if (options_.weighted) args.weight = place(*weight_);
    const bool reduced = options_.reduction != Reduction::none;
    if (!reduced) args.loss = {place(*loss_), loss_->dtype(), 1};
    args.total = {options_.reduction, reduced ? place(*total_) : nullptr, total_->dtype(),
                  static_cast<double*>(place(*divisor_))};
    if (options_.flow != Flow::absent) {
      args.flow.grad_loss = {place(*grad_loss_), grad_loss_->dtype(), options_.flow == Flow::each ? 1 : 0};
    }
    if (options_.reduction == Reduction::mean) args.flow.divisor = args.total.divisor;
    args.grad_log_probs = on_device ? gradient_.on_device() : gradient_.on_cpu();
    return args;
  }

  double weight_of(std::int64_t position) const {
    if (classes_[position] < 0) return 0;
    return options_.weighted ? weight_->of_cpu(classes_[position]) : 1;
  }

  double divisor() const {
    double divisor = 0;
    for (std::int64_t i = 0; i < shape_.positions(); ++i) divisor += weight_of(i);
    return divisor;
  }

  void judge_forward() {
    Truth total;
    for (std::int64_t i = 0; i < shape_.positions(); ++i) {
      Truth loss;
      if (classes_[i] >= 0) {
        loss.value = -weight_of(i) * log_probs_.tensor().of_cpu(i * shape_.classes + classes_[i]);
        loss.tolerance = u_ * std::fabs(loss.value);  // one product
      }
      total.value += loss.value;
      total.tolerance += loss.tolerance;
      if (options_.reduction == Reduction::none) judge("forward", *loss_, i, loss);
    }
    judge("forward", *divisor_, 0, {divisor(), 1e-15 * divisor() * double(shape_.positions())});
    if (options_.reduction == Reduction::none) return;
    if (options_.reduction == Reduction::mean) total = {total.value / divisor(), total.tolerance / divisor()};
    judge("forward", *total_, 0, total);
  }

  void judge_backward() {
    const double scale = options_.reduction == Reduction::mean ? 1 / divisor() : 1;
    for (std::int64_t i = 0; i < shape_.positions(); ++i) {
      double flow = scale;
      if (options_.flow != Flow::absent) flow *= grad_loss_->of_cpu(options_.flow == Flow::each ? i : 0);
      for (std::int64_t c = 0; c < shape_.classes; ++c) {
        const std::int64_t k = i * shape_.classes + c;
        if (c == classes_[i]) {
          // The flow is rounded once, and a product.
          judge("backward", gradient_.tensor(), k, {-weight_of(i) * flow, 3 * u_ * std::fabs(weight_of(i) * flow)});
        } else {
          EXPECT(gradient_.tensor().of_device(k) == 0, "backward: entry (%ld, %ld) is %g", long(i), long(c),
                 gradient_.tensor().of_device(k));
        }
      }
    }
  }

  const Options options_;
  const ClassShape shape_;
  Random random_;
  double u_;
  ClassValues log_probs_, gradient_;
  std::unique_ptr<Tensor> targets_, weight_, loss_, total_, divisor_, grad_loss_;
  std::vector<std::int64_t> classes_;
  std::vector<Tensor*> inputs_;
};

const std::vector<Options>& all_options() {
  static const std::vector<Options> table{
      {.name = "plain"},
      {.name = "each loss", .index = Dtype::int32, .flow = Flow::each, .reduction = Reduction::none},
      {.name = "weights", .index = Dtype::uint8, .weighted = true, .other_loss = true},
      {.name = "weights, sum", .weighted = true, .flow = Flow::absent, .reduction = Reduction::sum},
      {.name = "all ignored", .ignored = Ignored::all},
      {.name = "special", .reduction = Reduction::none, .special = true},
      {.name = "special, mean", .weighted = true, .special = true},
  };
  return table;
}

std::vector<Shape> shapes(Level level) {
  const Placement odd{Order::rows, 1, 0}, gaps{Order::rows, 1, 3}, columns{Order::columns, 0, 0};
  std::vector<Shape> result{
      {1, 1, 300, odd},
      {1, 7, 300, {}},
      {1, 7, 300, gaps},
      {1, 19, 61, odd},
      {3, 19, 5, gaps},
      {2, 7, 35, columns},
      {2, 33, 3, {Order::strided, 1, 0}},
      {1, 1000, 20, odd},
      {1, 33, 9, {}, columns},
      {0, 7, 3, {}},
      {2, 5, 0, columns},
  };
  if (level == Level::full) {
    result.insert(result.end(), {{1, 2, 200003, {}},
                                 {1, 10, 40001, gaps},
                                 {1, 1025, 300, odd},
                                 {1, 50257, 7, odd},
                                 {1, 128256, 2, gaps},
                                 {4, 19, 5000, columns}});
  }
  return result;
}

}  // namespace

void add_nll(std::vector<Case>& cases, const Selection& selection) {
  int turn = selection.rotation;
  for (const Shape& shape : shapes(selection.level)) {
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64}) {
      const int step = selection.level == Level::small ? 5 : 1;
      turn += 1;
      for (int i = turn % step; i < int(all_options().size()); i += step) {
        const Options& o = all_options()[i];
        const std::string size = std::to_string(shape.outer) + "x" + std::to_string(shape.classes) + "x" +
                                 std::to_string(shape.inner) + "+" + std::to_string(shape.log_probs.first);
        cases.push_back({std::string("nll, ") + name_of(dtype) + ", " + size + ", " + o.name,
                         [shape, o, dtype] { Test(shape, o, dtype).run(); }});
      }
    }
  }
}

}  // namespace check
