// Binary cross entropy on probabilities, over tensors.

#include "elementwise_autograd.h"

namespace fusedloss::ops {

constinit const ElementwiseLoss Bce::kLoss{"binary_cross_entropy",
                                           [](const auto& losses) -> const auto& { return losses.bce; }, true};

void Bce::check_autocast(const Tensor& input) {
  TORCH_CHECK(!input.is_cuda(),
              "binary_cross_entropy is unsafe to autocast on CUDA, as in native torch: the sigmoid before it loses the "
              "loss in half precision. Use binary_cross_entropy_with_logits, or leave autocast for this call.");
}

template struct Elementwise<Bce>;

}  // namespace fusedloss::ops
