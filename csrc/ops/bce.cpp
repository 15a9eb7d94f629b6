// Binary cross entropy on probabilities, over tensors.

#include "elementwise.h"

namespace fusedloss::ops {
namespace {

constexpr ElementwiseLoss kLoss{"binary_cross_entropy", [](const auto& losses) -> const auto& { return losses.bce; },
                                true};

}  // namespace

LossAndDivisor bce(const Tensor& input, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   OptionalIndex ignore_index, bool upcast, OptionalBool, OptionalTensor) {
  return elementwise_forward(kLoss, {input, target, weight.value_or(Tensor()), Tensor(), reduction, ignore_index},
                             upcast);
}

Tensor bce_with_grad(const Tensor& input, const Tensor& target, OptionalTensor weight, OptionalTensor grad_scale,
                     int64_t reduction, OptionalIndex ignore_index, bool upcast, Tensor& grad_input,
                     OptionalTensor scale) {
  return elementwise_with_grad(kLoss, {input, target, weight.value_or(Tensor()), Tensor(), reduction, ignore_index},
                               grad_scale, upcast, grad_input, scale);
}

TwoGrads bce_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, OptionalTensor weight,
                      const Tensor& divisor, int64_t reduction, OptionalIndex ignore_index,
                      std::array<bool, 2> output_mask) {
  return elementwise_backward(kLoss, {input, target, weight.value_or(Tensor()), Tensor(), reduction, ignore_index},
                              grad_loss, divisor, output_mask);
}

}  // namespace fusedloss::ops
