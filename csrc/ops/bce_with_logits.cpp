// Binary cross entropy on logits, over tensors.

#include "elementwise_autograd.h"

namespace fusedloss::ops {

constinit const ElementwiseLoss BceWithLogits::kLoss{
    "binary_cross_entropy_with_logits", [](const auto& losses) -> const auto& { return losses.bce_with_logits; },
    false};

template struct Elementwise<BceWithLogits>;

}  // namespace fusedloss::ops
