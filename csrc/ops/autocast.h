// The forward operators under the Autocast keys. Native torch casts the logits to float32 first, a copy forward and
// another backward; these read half precision as it is and return the float32 loss that native returns.

#pragma once

#include "losses.h"

namespace fusedloss::autocast {

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

}  // namespace fusedloss::autocast
