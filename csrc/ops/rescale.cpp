// A gradient that forward has written, once the grad_output is known.

#include <ATen/Dispatch.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>

#include "checks.h"
#include "launch.h"
#include "losses.h"

namespace fusedloss::ops {
namespace {

// The number in a tensor of one element of the CPU.
double number_in(const Tensor& tensor) {
  double number = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "rescale_grad_",
                                  [&] { number = static_cast<double>(*tensor.const_data_ptr<scalar_t>()); });
  return number;
}

// One launch, which does nothing where the factor is 1: the host does not know it.
void rescale_on_device(Tensor& grad, const Tensor& grad_output, const Tensor& assumed) {
  const c10::DeviceGuard guard(grad.device());
  cuda::RescaleArgs args;
  args.grad = grad.data_ptr();
  args.dtype = dtype_of(grad.scalar_type());
  args.numel = grad.numel();
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_dtype = dtype_of(grad_output.scalar_type());
  args.assumed = assumed.defined() ? assumed.const_data_ptr() : nullptr;
  if (current_backend() == Backend::triton) {
    launch_triton(triton_kernels().rescale, args, grad);
  } else {
    cuda_rescale(args, current_stream(grad.device()));
  }
}

}  // namespace

void rescale_grad_(Tensor& grad, const Tensor& grad_output, OptionalTensor grad_scale) {
  TORCH_CHECK(grad_output.sym_numel() == 1, "rescale_grad_: grad_output must be one number, got shape ",
              grad_output.sym_sizes());
  check_devices("rescale_grad_", {{"grad", grad}, {"grad_output", grad_output}, {"grad_scale", grad_scale}});
  check_floating("rescale_grad_", "grad_output", grad_output);
  if (grad.is_meta()) return;
  const Tensor assumed = assumed_grad_output(grad_scale, grad_output.scalar_type());
  const bool on_device = current_backend() == Backend::triton || runs_on_cuda(grad);
  if (!on_device) {
    const double factor = number_in(grad_output) / (assumed.defined() ? number_in(assumed) : 1);
    if (factor != 1) grad.mul_(factor);
  } else if (grad.is_non_overlapping_and_dense()) {
    rescale_on_device(grad, grad_output, assumed);
  } else {
    // Overwritten logits with gaps between their rows.
    grad.mul_(assumed.defined() ? grad_output.div(assumed) : grad_output);
  }
}

}  // namespace fusedloss::ops
