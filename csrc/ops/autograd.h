// The forward operators under the Autograd key, with their gradients.

#pragma once

#include "losses.h"

namespace fusedloss::autograd {

using at::Tensor;
using ops::CrossEntropyOutputs;
using ops::LossAndDivisor;
using ops::OptionalIndex;
using ops::OptionalTensor;

CrossEntropyOutputs cross_entropy(const Tensor& logits, const Tensor& target, OptionalTensor weight, int64_t reduction,
                                  int64_t ignore_index, double label_smoothing, double z_loss, double logit_softcap,
                                  bool return_lse, bool upcast);
LossAndDivisor nll(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   int64_t ignore_index, bool upcast);
LossAndDivisor bce_with_logits(const Tensor& input, const Tensor& target, OptionalTensor weight,
                               OptionalTensor pos_weight, int64_t reduction, OptionalIndex ignore_index, bool upcast);
LossAndDivisor bce(const Tensor& input, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   OptionalIndex ignore_index, bool upcast);

}  // namespace fusedloss::autograd
