// The table of contents of the C++ side: schemas, then which function answers under which dispatch key.

#include <torch/library.h>

#include "ops/losses.h"

namespace fusedloss {

TORCH_LIBRARY(fusedloss, m) {
  // reduction: 0 none, 1 mean, 2 sum. Forward operators return what their backward needs behind the loss;
  // NAME_with_grad is forward and backward in one pass.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float logit_softcap, bool return_lse, bool upcast=False, "
      "bool? grad_in_forward=None, Tensor? grad_scale=None, bool inplace=False, bool statistics=False) "
      "-> (Tensor loss, Tensor lse, Tensor row_max, Tensor row_log_sum, Tensor divisor)");
  m.def(
      "cross_entropy_with_grad(Tensor logits, Tensor target, Tensor? weight, Tensor? grad_scale, int reduction, "
      "int ignore_index, float label_smoothing, float z_loss, float logit_softcap, bool upcast, "
      "Tensor(a!) grad_logits) -> Tensor loss");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor row_max, Tensor row_log_sum, Tensor divisor, int reduction, int ignore_index, float label_smoothing, "
      "float z_loss, float logit_softcap, bool[2] output_mask) -> (Tensor grad_logits, Tensor grad_target)");
  m.def(
      "nll(Tensor log_probs, Tensor target, Tensor? weight, int reduction, int ignore_index, bool upcast=False) "
      "-> (Tensor loss, Tensor divisor)");
  m.def(
      "nll_backward(Tensor grad_loss, Tensor log_probs, Tensor target, Tensor? weight, Tensor divisor, "
      "int reduction, int ignore_index) -> Tensor grad_log_probs");
  m.def(
      "bce_with_logits(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, int reduction, "
      "int? ignore_index, bool upcast=False, bool? grad_in_forward=None, Tensor? grad_scale=None, "
      "bool inplace=False) -> (Tensor loss, Tensor divisor)");
  m.def(
      "bce_with_logits_with_grad(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? grad_scale, "
      "int reduction, int? ignore_index, bool upcast, Tensor(a!) grad_input) -> Tensor loss");
  m.def(
      "bce_with_logits_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "Tensor divisor, int reduction, int? ignore_index, bool[2] output_mask) "
      "-> (Tensor grad_input, Tensor grad_target)");
  m.def(
      "bce(Tensor input, Tensor target, Tensor? weight, int reduction, int? ignore_index, bool upcast=False, "
      "bool? grad_in_forward=None, Tensor? grad_scale=None) -> (Tensor loss, Tensor divisor)");
  m.def(
      "bce_with_grad(Tensor input, Tensor target, Tensor? weight, Tensor? grad_scale, int reduction, "
      "int? ignore_index, bool upcast, Tensor(a!) grad_input) -> Tensor loss");
  m.def(
      "bce_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor divisor, int reduction, "
      "int? ignore_index, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_target)");

  m.def("rescale_grad_(Tensor(a!) grad, Tensor grad_output, Tensor? grad_scale) -> ()");
  m.def(
      "recover_logits(Tensor grad_logits, Tensor target, Tensor? weight, Tensor? grad_scale, int reduction, "
      "int ignore_index, float label_smoothing) -> Tensor logits");  // fusedloss/double_backward.py
}

static void implement(torch::Library& m) {
  m.impl("cross_entropy", ops::cross_entropy);
  m.impl("cross_entropy_with_grad", ops::cross_entropy_with_grad);
  m.impl("cross_entropy_backward", ops::cross_entropy_backward);
  m.impl("nll", ops::nll);
  m.impl("nll_backward", ops::nll_backward);
  m.impl("bce_with_logits", ops::bce_with_logits);
  m.impl("bce_with_logits_with_grad", ops::bce_with_logits_with_grad);
  m.impl("bce_with_logits_backward", ops::bce_with_logits_backward);
  m.impl("bce", ops::bce);
  m.impl("bce_with_grad", ops::bce_with_grad);
  m.impl("bce_backward", ops::bce_backward);
  m.impl("rescale_grad_", ops::rescale_grad_);
}

static void implement_autocast(torch::Library& m) {
  m.impl("cross_entropy", autocast::cross_entropy);
  m.impl("nll", autocast::nll);
  m.impl("bce_with_logits", autocast::bce_with_logits);
  m.impl("bce", autocast::bce);
}

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { implement(m); }
#if defined(FUSEDLOSS_WITH_CUDA)
TORCH_LIBRARY_IMPL(fusedloss, CUDA, m) { implement(m); }
#endif
TORCH_LIBRARY_IMPL(fusedloss, Meta, m) { implement(m); }
TORCH_LIBRARY_IMPL(fusedloss, AutocastCPU, m) { implement_autocast(m); }
TORCH_LIBRARY_IMPL(fusedloss, AutocastCUDA, m) { implement_autocast(m); }

TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  m.impl("cross_entropy", autograd::cross_entropy);
  m.impl("nll", autograd::nll);
  m.impl("bce_with_logits", autograd::bce_with_logits);
  m.impl("bce", autograd::bce);
}

}  // namespace fusedloss
