// The table of contents of the C++ side: schemas, then which function answers under which dispatch key.

#include <torch/library.h>

#include "ops/backend.h"
#include "ops/double_backward.h"
#include "ops/losses.h"

namespace fusedloss {

using ops::Backend;
using ops::Under;

static void define(torch::Library& m) {
  // reduction: 0 none, 1 mean, 2 sum. Forward operators return what their backward needs behind the loss;
  // NAME_with_grad is forward and backward in one pass.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, "
      "float label_smoothing, float z_loss, float logit_softcap, bool return_lse, bool upcast=False, "
      "bool? grad_in_forward=None, Tensor? grad_scale=None, bool inplace=False, bool statistics=False) "
      "-> (Tensor loss, Tensor lse, Tensor row_max, Tensor row_log_sum, Tensor divisor)");
  m.def(
      "cross_entropy_with_grad(Tensor logits, Tensor target, Tensor? weight, Tensor? grad_scale, int reduction, "
      "SymInt ignore_index, float label_smoothing, float z_loss, float logit_softcap, bool upcast, "
      "Tensor(a!) grad_logits, Tensor(b!)? scale=None) -> Tensor loss");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor row_max, Tensor row_log_sum, Tensor divisor, int reduction, SymInt ignore_index, float label_smoothing, "
      "float z_loss, float logit_softcap, bool[2] output_mask) -> (Tensor grad_logits, Tensor grad_target)");
  m.def(
      "nll(Tensor log_probs, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, bool upcast=False) "
      "-> (Tensor loss, Tensor divisor)");
  m.def(
      "nll_backward(Tensor grad_loss, Tensor log_probs, Tensor target, Tensor? weight, Tensor divisor, "
      "int reduction, SymInt ignore_index) -> Tensor grad_log_probs");
  m.def(
      "bce_with_logits(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, int reduction, "
      "SymInt? ignore_index, bool upcast=False, bool? grad_in_forward=None, Tensor? grad_scale=None, "
      "bool inplace=False) -> (Tensor loss, Tensor divisor)");
  m.def(
      "bce_with_logits_with_grad(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? grad_scale, "
      "int reduction, SymInt? ignore_index, bool upcast, Tensor(a!) grad_input, Tensor(b!)? scale=None) -> Tensor "
      "loss");
  m.def(
      "bce_with_logits_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "Tensor divisor, int reduction, SymInt? ignore_index, bool[2] output_mask) "
      "-> (Tensor grad_input, Tensor grad_target)");
  m.def(
      "bce(Tensor input, Tensor target, Tensor? weight, int reduction, SymInt? ignore_index, bool upcast=False, "
      "bool? grad_in_forward=None, Tensor? grad_scale=None) -> (Tensor loss, Tensor divisor)");
  m.def(
      "bce_with_grad(Tensor input, Tensor target, Tensor? weight, Tensor? grad_scale, int reduction, "
      "SymInt? ignore_index, bool upcast, Tensor(a!) grad_input, Tensor(b!)? scale=None) -> Tensor loss");
  m.def(
      "bce_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor divisor, int reduction, "
      "SymInt? ignore_index, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_target)");

  m.def("rescale_grad_(Tensor(a!) grad, Tensor grad_output, Tensor? scale, bool keep_zeros) -> ()");
  m.def("rescale_grad(Tensor grad, Tensor grad_output, Tensor? scale, bool keep_zeros) -> Tensor");
}

template <Backend kBackend>
static void implement(torch::Library& m) {
  m.impl("cross_entropy", Under<kBackend, &ops::cross_entropy>::call);
  m.impl("cross_entropy_with_grad", Under<kBackend, &ops::cross_entropy_with_grad>::call);
  m.impl("cross_entropy_backward", Under<kBackend, &ops::cross_entropy_backward>::call);
  m.impl("nll", Under<kBackend, &ops::nll>::call);
  m.impl("nll_backward", Under<kBackend, &ops::nll_backward>::call);
  m.impl("bce_with_logits", Under<kBackend, &ops::bce_with_logits>::call);
  m.impl("bce_with_logits_with_grad", Under<kBackend, &ops::bce_with_logits_with_grad>::call);
  m.impl("bce_with_logits_backward", Under<kBackend, &ops::bce_with_logits_backward>::call);
  m.impl("bce", Under<kBackend, &ops::bce>::call);
  m.impl("bce_with_grad", Under<kBackend, &ops::bce_with_grad>::call);
  m.impl("bce_backward", Under<kBackend, &ops::bce_backward>::call);
  m.impl("rescale_grad_", Under<kBackend, &ops::rescale_grad_>::call);
  m.impl("rescale_grad", Under<kBackend, &ops::rescale_grad>::call);
}

template <Backend kBackend>
static void implement_autocast(torch::Library& m) {
  m.impl("cross_entropy", Under<kBackend, &autocast::cross_entropy>::call);
  m.impl("nll", Under<kBackend, &autocast::nll>::call);
  m.impl("bce_with_logits", Under<kBackend, &autocast::bce_with_logits>::call);
  m.impl("bce", Under<kBackend, &autocast::bce>::call);
}

template <Backend kBackend>
static void implement_autograd(torch::Library& m) {
  m.impl("cross_entropy", Under<kBackend, &autograd::cross_entropy>::call);
  m.impl("nll", Under<kBackend, &autograd::nll>::call);
  m.impl("bce_with_logits", Under<kBackend, &autograd::bce_with_logits>::call);
  m.impl("bce", Under<kBackend, &autograd::bce>::call);
  for (const char* name : {"cross_entropy_backward", "nll_backward", "bce_with_logits_backward", "bce_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&autograd::backward_operator>());
  }
}

TORCH_LIBRARY(fusedloss, m) { define(m); }
TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { implement<Backend::compiled>(m); }
#if defined(FUSEDLOSS_WITH_CUDA)
TORCH_LIBRARY_IMPL(fusedloss, CUDA, m) { implement<Backend::compiled>(m); }
#endif
TORCH_LIBRARY_IMPL(fusedloss, Meta, m) { implement<Backend::compiled>(m); }
TORCH_LIBRARY_IMPL(fusedloss, AutocastCPU, m) { implement_autocast<Backend::compiled>(m); }
TORCH_LIBRARY_IMPL(fusedloss, AutocastCUDA, m) { implement_autocast<Backend::compiled>(m); }
TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) { implement_autograd<Backend::compiled>(m); }

// Whatever device Triton has a driver for; of the CPU, its interpreter.
TORCH_LIBRARY(fusedloss_triton, m) { define(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, CPU, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, CUDA, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, XPU, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, Meta, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, AutocastCPU, m) { implement_autocast<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, AutocastCUDA, m) { implement_autocast<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, AutocastXPU, m) { implement_autocast<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, Autograd, m) { implement_autograd<Backend::triton>(m); }

}  // namespace fusedloss
