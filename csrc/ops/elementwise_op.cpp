#include "elementwise_op.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "checks.h"
#include "huge_pages.h"
#include "launch.h"

namespace fusedloss::ops {
namespace {

void check_broadcasts(const ElementwiseLoss& loss, const char* name, const Tensor& tensor, const Tensor& input) {
  if (!tensor.defined()) return;
  check_weight(loss.name, name, tensor);
  const auto sizes = tensor.sym_sizes(), input_sizes = input.sym_sizes();
  // Unlike at::is_expandable_to, this asks nothing of the input where the tensor has one element: a compiler may not
  // know the input's size.
  const bool fits = sizes.size() <= input_sizes.size() && std::equal(sizes.rbegin(), sizes.rend(), input_sizes.rbegin(),
                                                                     [](const auto& size, const auto& input_size) {
                                                                       return size == 1 || size == input_size;
                                                                     });
  TORCH_CHECK(fits, loss.name, ": ", name, " of shape ", sizes, " does not broadcast to the input's shape ",
              input_sizes);
}

// A weight that must be where the input is. One number of the CPU may weigh tensors of another device, where native
// torch multiplies by it as it is; native's loss of probabilities expands it first.
std::optional<Tensor> unless_number(const ElementwiseLoss& loss, const Tensor& weight) {
  const bool is_number = !loss.probabilities && weight.defined() && weight.dim() == 0 && weight.is_cpu();
  return is_number ? std::nullopt : to_optional(weight);
}

void check(const ElementwiseLoss& loss, const ElementwiseInputs& in, bool upcast) {
  check_reduction(loss.name, in.options.reduction);
  const auto weight = unless_number(loss, in.weight), pos_weight = unless_number(loss, in.pos_weight);
  check_devices(loss.name,
                {{"input", in.input}, {"target", in.target}, {"weight", weight}, {"pos_weight", pos_weight}});
  TORCH_CHECK_VALUE(in.target.sym_sizes() == in.input.sym_sizes(), loss.name, ": target must have the input's shape ",
                    in.input.sym_sizes(), ", got ", in.target.sym_sizes());
  const auto input_type = in.input.scalar_type(), target_type = in.target.scalar_type();
  const bool integral_target = at::isIntegralType(target_type, /*includeBool=*/true) && readable_as(target_type);
  TORCH_CHECK(
      !loss.probabilities || integral_target || upcast_type(target_type, upcast) == upcast_type(input_type, upcast),
      loss.name, ": target must have the input's type ", input_type, ", or an integer or bool one, got ", target_type);
  check_floating(loss.name, "input", in.input);
  check_real(loss.name, "target", in.target);
  if (!integral_target) check_floating(loss.name, "target", in.target);
  check_broadcasts(loss, "weight", in.weight, in.input);
  check_broadcasts(loss, "pos_weight", in.pos_weight, in.input);
}

// More dimensions than a kernel can walk are copied, inputs before outputs are made like them: contiguous, all of them
// merge into one.
Tensor walkable(const Tensor& tensor, const Tensor& input) {
  if (!tensor.defined() || input.dim() <= kMaxDims) return tensor;
  return tensor.expand_symint(input.sym_sizes()).contiguous();
}

// A floating-point target decides the result's type, as in native torch; other targets have no say.
at::ScalarType loss_type(const ElementwiseInputs& in, bool upcast) {
  const auto& decides = at::isFloatingType(in.target.scalar_type()) ? in.target : in.input;
  return upcast_type(decides.scalar_type(), upcast);
}

// Turns what the checks have let through into what a kernel reads.
void prepare(ElementwiseInputs& in, bool upcast) {
  in.input = widened(in.input, loss_type(in, upcast));
  for (Tensor* weight : {&in.weight, &in.pos_weight}) {
    if (!weight->defined()) continue;
    if (!readable_as(weight->scalar_type())) *weight = weight->to(accumulate_type(in.input.scalar_type()));
    if (weight->device() != in.input.device()) {
      // Unlike a copy, this neither waits for the device nor fails while a CUDA graph is captured.
      *weight = at::empty({}, weight->options().device(in.input.device())).fill_(*weight);
    }
  }
  for (Tensor* tensor : {&in.target, &in.weight, &in.pos_weight, &in.input}) *tensor = walkable(*tensor, in.input);
}

// A tensor of a kernel launch, undefined where it is absent, and what the kernel is told of it.
struct Operand {
  Tensor tensor;
  ElementwiseTensor& view;
};

// Outermost first by the first operand's strides; neighbours that all operands walk with one stride become one.
void merge_dims(ElementwiseShape& shape, at::IntArrayRef sizes, at::ArrayRef<Operand> operands) {
  c10::SmallVector<int64_t, kMaxDims> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  const auto strides = operands.front().tensor.strides();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  for (const int64_t d : order) {
    if (sizes[d] == 1) continue;
    const bool merges = shape.dims > 0 && std::all_of(operands.begin(), operands.end(), [&](const Operand& operand) {
                          return operand.view.strides[shape.dims - 1] == operand.tensor.stride(d) * sizes[d];
                        });
    if (!merges) {
      TORCH_INTERNAL_ASSERT(shape.dims < kMaxDims);
      shape.sizes[shape.dims++] = 1;
    }
    shape.sizes[shape.dims - 1] *= sizes[d];
    for (const auto& [tensor, view] : operands) view.strides[shape.dims - 1] = tensor.stride(d);
  }
}

// What every pass tells the kernel, and all its tensors: dimensions can be merged only where the strides of every one
// of them allow it. results: what the pass has beside its inputs.
void fill(ElementwiseArgs& args, const ElementwiseInputs& in, std::initializer_list<Operand> results) {
  args.dtype = dtype_of(in.input.scalar_type());
  args.has_ignore_index = in.options.ignore_index.has_value();
  args.ignore_index = in.options.ignore_index.value_or(0).expect_int();
  args.shape.numel = in.input.numel();

  const std::initializer_list<Operand> inputs{
      {in.input, args.input}, {in.target, args.target}, {in.weight, args.weight}, {in.pos_weight, args.pos_weight}};
  c10::SmallVector<Operand, 8> operands;
  for (const auto& list : {inputs, results}) {
    for (const auto& [tensor, view] : list) {
      if (tensor.defined()) operands.push_back({tensor.expand(in.input.sizes()), view});
    }
  }
  merge_dims(args.shape, in.input.sizes(), operands);
  for (const auto& [tensor, view] : operands) {
    view.data = tensor.data_ptr();
    view.dtype = dtype_of(tensor.scalar_type());
    view.linear = true;
    int64_t expected = 1;
    for (int d = args.shape.dims; d-- > 0; expected *= args.shape.sizes[d]) {
      view.linear = view.linear && view.strides[d] == expected;
    }
  }
}

// The gradient of no element of a loss on logits is larger, for a grad_output of 1. There are elements.
Tensor largest_gradient(const ElementwiseInputs& in) {
  const auto largest = [](const Tensor& tensor) { return tensor.to(at::kFloat).abs().amax().to(at::kDouble); };
  Tensor result = largest(in.target);
  if (in.pos_weight.defined()) result = result * (largest(in.pos_weight) + 1);
  result = result * 2 + 1;
  if (in.weight.defined()) result = result * largest(in.weight);
  if (in.options.reduction != Reduction::mean) return result;
  const bool ignores = in.options.ignore_index.has_value();
  return result / (ignores ? in.target.ne(in.options.ignore_index->expect_int()).sum()
                           : at::full({}, in.input.numel(), in.input.options().dtype(at::kDouble)));
}

[[noreturn]] void raise_out_of_domain(const ElementwiseLoss& loss, const ElementwiseInputs& in) {
  const Tensor input = in.input.detach().to(at::kDouble).contiguous();
  const Tensor target = in.target.detach().to(at::kDouble).contiguous();
  const double* x = input.const_data_ptr<double>();
  const double* t = target.const_data_ptr<double>();
  for (int64_t i = 0; i < input.numel(); ++i) {
    if (in.options.ignore_index.has_value() && t[i] == double(in.options.ignore_index->expect_int())) continue;
    for (const auto& [name, value] : {std::pair{"input", x[i]}, std::pair{"target", t[i]}}) {
      TORCH_CHECK(value >= 0 && value <= 1, loss.name, ": all elements of ", name, " should be between 0 and 1, got ",
                  value, " at position ", i);
    }
  }
  TORCH_CHECK(false, loss.name, ": input or target changed while the loss was computed");
}

}  // namespace

LossAndDivisor elementwise_forward(const ElementwiseLoss& loss, ElementwiseInputs in, bool upcast) {
  check(loss, in, upcast);

  const auto options = in.input.options().dtype(loss_type(in, upcast));
  const bool reduced = in.options.reduction != Reduction::none;
  // Native torch's loss of logits starts from 1 - target.
  Tensor result = reduced ? at::empty({}, options) : at::empty_like(loss.probabilities ? in.input : in.target, options);
  Tensor divisor = at::empty({}, in.input.options().dtype(at::kDouble));

  if (!in.input.is_meta()) {
    prepare(in, upcast);
    const Tensor written = reduced ? Tensor() : walkable(result, in.input);
    ElementwiseArgs args;
    fill(args, in, {{written, args.loss}});
    args.total = total_of(result, divisor, in.options.reduction);
    if (run(loss.kernels, Pass::forward, args, in.input) >= 0) raise_out_of_domain(loss, in);
    if (!reduced && !written.is_same(result)) result.copy_(written);
  }
  return {result, divisor};
}

Tensor elementwise_with_grad(const ElementwiseLoss& loss, ElementwiseInputs in, OptionalTensor grad_scale, bool upcast,
                             Tensor& grad_input, OptionalTensor scale) {
  check(loss, in, upcast);
  check_with_grad(loss.name, in.input, grad_input, grad_scale, scale, in.options.reduction);
  Tensor result = at::empty({}, in.input.options().dtype(loss_type(in, upcast)));

  if (!in.input.is_meta()) {
    prepare(in, upcast);
    const bool same_type = in.input.scalar_type() == grad_input.scalar_type();
    Tensor grad = same_type ? walkable(grad_input, in.input) : at::empty_like(in.input);
    ElementwiseArgs args;
    fill(args, in, {{grad, args.grad_input}});
    if (is_present(scale)) {
      scale->copy_(chosen_scale(grad_scale, grad_input, result.scalar_type(), [&] { return largest_gradient(in); }));
      args.grad_loss = {scale->data_ptr(), Dtype::float64};
    }
    args.total = total_of(result, Tensor(), in.options.reduction);
    if (run(loss.kernels, Pass::forward_with_gradient, args, in.input) >= 0) raise_out_of_domain(loss, in);
    if (!grad.is_same(grad_input)) grad_input.copy_(grad);
  }
  return result;
}

TwoGrads elementwise_backward(const ElementwiseLoss& loss, ElementwiseInputs in, Tensor grad_loss,
                              const Tensor& divisor, std::array<bool, 2> output_mask) {
  const bool upcast = true;  // forward has checked the types, under autocast or not
  check(loss, in, upcast);
  check_grad_loss(loss.name, in.input, grad_loss, divisor, in.options.reduction, in.input.sym_sizes());
  TORCH_CHECK(!output_mask[1] || at::isFloatingType(in.target.scalar_type()), loss.name, ": a target of ",
              in.target.scalar_type(), " has no gradient");

  const auto input_type = in.input.scalar_type();
  prepare(in, upcast);
  grad_loss = walkable(grad_loss, in.input);
  const auto grad_like = [](const Tensor& tensor, bool wanted) {
    return wanted ? with_huge_pages(at::empty_like(tensor)) : at::empty({0}, tensor.options());
  };
  Tensor grad_input = grad_like(in.input, output_mask[0]), grad_target = grad_like(in.target, output_mask[1]);

  if (!in.input.is_meta()) {
    ElementwiseArgs args;
    fill(args, in,
         {{grad_loss, args.grad_loss},
          {output_mask[0] ? grad_input : Tensor(), args.grad_input},
          {output_mask[1] ? grad_target : Tensor(), args.grad_target}});
    args.grad_divisor = grad_divisor(divisor, in.options.reduction);
    run(loss.kernels, Pass::backward, args, in.input);
  }
  return {grad_input.to(input_type), grad_target};
}

}  // namespace fusedloss::ops
