// A gradient that was written in forward: for which grad_output, and what it becomes once the real one is known.

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/copysign.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <c10/core/DynamicCast.h>

#include <cmath>

#include "checks.h"
#include "launch.h"
#include "losses.h"

namespace fusedloss::ops {
namespace {

// The number in a tensor of one element of the CPU. Unlike item(), this is no operator, which a mode would see.
double number_in(const Tensor& tensor) {
  return c10::fetch_and_cast<double>(tensor.scalar_type(), tensor.const_data_ptr());
}

// The factor is a tensor of the accumulate type, which ATen multiplies by as it is: a number it would round first, in
// half precision by 0.2 % or to infinity.
void rescale_on_cpu(Tensor& grad, double factor, bool keep_zeros) {
  if (factor == 1) return;
  const Tensor number = at::scalar_tensor(factor, grad.options().dtype(accumulate_type(grad.scalar_type())));
  const bool masks = keep_zeros && !std::isfinite(factor);
  const Tensor zeros = masks ? grad.eq(0) : Tensor();
  grad.mul_(number);
  if (masks) grad.masked_fill_(zeros, 0);
}

// One launch, which does nothing where the factor is 1: the host does not know it.
void rescale_on_device(Tensor& grad, const Tensor& grad_output, OptionalTensor scale, bool keep_zeros) {
  const c10::DeviceGuard guard(grad.device());
  cuda::RescaleArgs args;
  args.grad = grad.data_ptr();
  args.dtype = dtype_of(grad.scalar_type());
  args.numel = grad.numel();
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_dtype = dtype_of(grad_output.scalar_type());
  args.scale = is_present(scale) ? scale->const_data_ptr<double>() : nullptr;
  args.keep_zeros = keep_zeros;
  if (current_backend == Backend::triton) {
    launch_triton(triton_kernels().rescale, args, grad);
  } else {
    cuda_rescale(args, current_stream(grad.device()));
  }
}

}  // namespace

Tensor chosen_scale(OptionalTensor grad_scale, const Tensor& grad, at::ScalarType loss_type,
                    c10::function_ref<Tensor()> largest_gradient) {
  const auto options = grad.options().dtype(at::kDouble);
  // As backward will see it: in the loss's type.
  const Tensor expected = is_present(grad_scale)
                              ? grad_scale->detach().reshape({}).to(loss_type).to(at::kDouble).nan_to_num(1)
                              : at::ones({}, options);
  // These types have room for any sensible number.
  if (grad.scalar_type() != at::kHalf) return at::copysign(expected.abs().clamp_(0x1p-24, 0x1p40), expected);
  // In float16 the entries from 2^15 down to a millionth of it keep their digits: no entry becomes larger, and the
  // largest no smaller than 1.
  const Tensor one = at::ones({}, options), largest = grad.numel() == 0 ? one : largest_gradient();
  const Tensor unit = at::where(largest.isfinite().logical_and_(largest > 0), largest, one);
  return at::copysign(at::clamp(expected.abs(), 1 / unit, 0x1p15 / unit), expected);
}

void rescale_grad_(Tensor& grad, const Tensor& grad_output, OptionalTensor scale, bool keep_zeros) {
  TORCH_CHECK(grad_output.sym_numel() == 1, "rescale_grad_: grad_output must be one number, got shape ",
              grad_output.sym_sizes());
  check_devices("rescale_grad_", {{"grad", grad}, {"grad_output", grad_output}, {"scale", scale}});
  check_floating("rescale_grad_", "grad", grad);
  check_floating("rescale_grad_", "grad_output", grad_output);
  TORCH_CHECK(!is_present(scale) || (scale->sym_numel() == 1 && scale->scalar_type() == at::kDouble),
              "rescale_grad_: scale must be one float64, got ", type_and_shape(*scale));
  if (grad.is_meta()) return;
  if (current_backend == Backend::compiled && !runs_on_cuda(grad)) {
    const double from = is_present(scale) ? number_in(*scale) : 1;
    rescale_on_cpu(grad, number_in(grad_output) / from, keep_zeros);
  } else {
    // Overwritten logits may have gaps between their rows, which are not ours.
    Tensor dense = grad.is_non_overlapping_and_dense() ? grad : grad.contiguous();
    rescale_on_device(dense, grad_output, scale, keep_zeros);
    if (!dense.is_same(grad)) grad.copy_(dense);
  }
}

Tensor rescale_grad(const Tensor& grad, const Tensor& grad_output, OptionalTensor scale, bool keep_zeros) {
  Tensor result = grad.clone();
  rescale_grad_(result, grad_output, scale, keep_zeros);
  return result;
}

}  // namespace fusedloss::ops
