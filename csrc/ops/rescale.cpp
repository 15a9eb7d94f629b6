// A gradient that forward has written, once the grad_output is known.

#include <ATen/ops/mul.h>

#include "launch.h"
#include "losses.h"

namespace fusedloss::ops {

void rescale_grad_(Tensor& grad, const Tensor& grad_output, OptionalTensor grad_scale) {
  TORCH_CHECK(grad_output.sym_numel() == 1, "rescale_grad_: grad_output must be one number, got shape ",
              grad_output.sym_sizes());
  if (grad.is_meta()) return;
  const double factor = number_in(grad_output) / assumed_grad_output(grad_scale, grad_output.scalar_type());
  if (factor != 1) grad.mul_(factor);
}

}  // namespace fusedloss::ops
