// Binary cross entropy on logits, over tensors.

#include "elementwise.h"

namespace fusedloss::ops {
namespace {

constexpr ElementwiseLoss kLoss{"binary_cross_entropy_with_logits",
                                [](const auto& losses) -> const auto& { return losses.bce_with_logits; }, false};

}  // namespace

LossAndDivisor bce_with_logits(const Tensor& input, const Tensor& target, OptionalTensor weight,
                               OptionalTensor pos_weight, int64_t reduction, OptionalIndex ignore_index, bool upcast,
                               OptionalBool, OptionalTensor, bool) {
  return elementwise_forward(
      kLoss, {input, target, weight.value_or(Tensor()), pos_weight.value_or(Tensor()), reduction, ignore_index},
      upcast);
}

Tensor bce_with_logits_with_grad(const Tensor& input, const Tensor& target, OptionalTensor weight,
                                 OptionalTensor pos_weight, OptionalTensor grad_scale, int64_t reduction,
                                 OptionalIndex ignore_index, bool upcast, Tensor& grad_input, OptionalTensor scale) {
  return elementwise_with_grad(
      kLoss, {input, target, weight.value_or(Tensor()), pos_weight.value_or(Tensor()), reduction, ignore_index},
      grad_scale, upcast, grad_input, scale);
}

TwoGrads bce_with_logits_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                  OptionalTensor weight, OptionalTensor pos_weight, const Tensor& divisor,
                                  int64_t reduction, OptionalIndex ignore_index, std::array<bool, 2> output_mask) {
  return elementwise_backward(
      kLoss, {input, target, weight.value_or(Tensor()), pos_weight.value_or(Tensor()), reduction, ignore_index},
      grad_loss, divisor, output_mask);
}

}  // namespace fusedloss::ops
