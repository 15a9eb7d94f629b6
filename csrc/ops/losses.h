// The operators, as functions over tensors: check, allocate, launch. One function serves every device; on the meta
// device (fake tensors, torch.compile, torch.export) it stops before the launch. The schemas, with the same names in
// the same order, are in csrc/register.cpp.
//
//   upcast            treat half precision as float32 when the result's type is decided: what native torch gives under
//                     autocast
//   grad_in_forward   write the gradient in forward: true, false, or absent: where nothing speaks against it
//   grad_scale        one number, the grad_output that backward is expected to be called with; absent: 1
//   inplace           the gradient may be written over the input
//   statistics        return what the backward operator needs; else these outputs are undefined, as they are where the
//                     gradient was written in forward. Compilers get them always: they take no undefined outputs
//
// grad_in_forward, grad_scale and inplace concern autograd alone (csrc/ops/autograd.cpp): below it, a forward operator
// only reads.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace fusedloss::ops {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;
using OptionalIndex = std::optional<c10::SymInt>;  // symbolic where a compiler traces a value that varies
using OptionalBool = std::optional<bool>;

using CrossEntropyOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, lse, row_max, row_log_sum, divisor
using LossAndDivisor = std::tuple<Tensor, Tensor>;
using TwoGrads = std::tuple<Tensor, Tensor>;  // each empty, of shape (0,), where its place in output_mask is false

CrossEntropyOutputs cross_entropy(const Tensor& logits, const Tensor& target, OptionalTensor weight, int64_t reduction,
                                  c10::SymInt ignore_index, double label_smoothing, double z_loss, double logit_softcap,
                                  bool return_lse, bool upcast, OptionalBool grad_in_forward, OptionalTensor grad_scale,
                                  bool inplace, bool statistics);
// Forward and backward in one pass: returns the loss and writes the gradient, which may be the logits, for a
// grad_output that it writes to `scale`: grad_scale, or where that would overflow or vanish in the gradient's type the
// nearest number that does not. Without `scale` it is 1, and nothing is expected.
Tensor cross_entropy_with_grad(const Tensor& logits, const Tensor& target, OptionalTensor weight,
                               OptionalTensor grad_scale, int64_t reduction, c10::SymInt ignore_index,
                               double label_smoothing, double z_loss, double logit_softcap, bool upcast,
                               Tensor& grad_logits, OptionalTensor scale);
TwoGrads cross_entropy_backward(const Tensor& grad_loss, OptionalTensor grad_lse, const Tensor& logits,
                                const Tensor& target, OptionalTensor weight, const Tensor& row_max,
                                const Tensor& row_log_sum, const Tensor& divisor, int64_t reduction,
                                c10::SymInt ignore_index, double label_smoothing, double z_loss, double logit_softcap,
                                std::array<bool, 2> output_mask);

LossAndDivisor nll(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   c10::SymInt ignore_index, bool upcast);
Tensor nll_backward(const Tensor& grad_loss, const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                    const Tensor& divisor, int64_t reduction, c10::SymInt ignore_index);

LossAndDivisor bce_with_logits(const Tensor& input, const Tensor& target, OptionalTensor weight,
                               OptionalTensor pos_weight, int64_t reduction, OptionalIndex ignore_index, bool upcast,
                               OptionalBool grad_in_forward, OptionalTensor grad_scale, bool inplace);
Tensor bce_with_logits_with_grad(const Tensor& input, const Tensor& target, OptionalTensor weight,
                                 OptionalTensor pos_weight, OptionalTensor grad_scale, int64_t reduction,
                                 OptionalIndex ignore_index, bool upcast, Tensor& grad_input, OptionalTensor scale);
TwoGrads bce_with_logits_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                  OptionalTensor weight, OptionalTensor pos_weight, const Tensor& divisor,
                                  int64_t reduction, OptionalIndex ignore_index, std::array<bool, 2> output_mask);

LossAndDivisor bce(const Tensor& input, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   OptionalIndex ignore_index, bool upcast, OptionalBool grad_in_forward, OptionalTensor grad_scale);
Tensor bce_with_grad(const Tensor& input, const Tensor& target, OptionalTensor weight, OptionalTensor grad_scale,
                     int64_t reduction, OptionalIndex ignore_index, bool upcast, Tensor& grad_input,
                     OptionalTensor scale);
TwoGrads bce_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, OptionalTensor weight,
                      const Tensor& divisor, int64_t reduction, OptionalIndex ignore_index,
                      std::array<bool, 2> output_mask);

// Multiplies a gradient that was written for a grad_output of `scale` (absent: 1) by grad_output / scale, in the
// accumulate type; does nothing where the two are equal. keep_zeros: what is 0 stays 0, also where inf or NaN flows
// back, as the gradients of ignored positions do.
void rescale_grad_(Tensor& grad, const Tensor& grad_output, OptionalTensor scale, bool keep_zeros);
Tensor rescale_grad(const Tensor& grad, const Tensor& grad_output, OptionalTensor scale, bool keep_zeros);

}  // namespace fusedloss::ops

// The forward operators under the Autograd key: with their gradients.
namespace fusedloss::autograd {

decltype(ops::cross_entropy) cross_entropy;
decltype(ops::nll) nll;
decltype(ops::bce_with_logits) bce_with_logits;
decltype(ops::bce) bce;

}  // namespace fusedloss::autograd

// The forward operators under the Autocast keys. Native torch casts the logits to float32 first, a copy forward and
// another backward; these read half precision as it is and return the float32 loss that native returns.
namespace fusedloss::autocast {

decltype(ops::cross_entropy) cross_entropy;
decltype(ops::nll) nll;
decltype(ops::bce_with_logits) bce_with_logits;
decltype(ops::bce) bce;

}  // namespace fusedloss::autocast
