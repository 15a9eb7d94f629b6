#include <c10/core/impl/LocalDispatchKeySet.h>

#include "checks.h"
#include "dispatch.h"
#include "losses.h"

namespace fusedloss::autocast {

using at::Tensor;
using ops::CrossEntropyOutputs;
using ops::LossAndDivisor;
using ops::OptionalBool;
using ops::OptionalIndex;
using ops::OptionalTensor;

namespace {

constexpr c10::DispatchKeySet kAutocastKeys{c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA,
                                            c10::DispatchKey::AutocastXPU};

}  // namespace

CrossEntropyOutputs cross_entropy(const Tensor& logits, const Tensor& target, OptionalTensor weight, int64_t reduction,
                                  c10::SymInt ignore_index, double label_smoothing, double z_loss, double logit_softcap,
                                  bool return_lse, bool, OptionalBool grad_in_forward, OptionalTensor grad_scale,
                                  bool inplace, bool statistics) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKeys);
  return FUSEDLOSS_OPERATOR(cross_entropy)
      .call(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap, return_lse, true,
            grad_in_forward, grad_scale, inplace, statistics);
}

LossAndDivisor nll(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   c10::SymInt ignore_index, bool) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKeys);
  return FUSEDLOSS_OPERATOR(nll).call(log_probs, target, weight, reduction, ignore_index, true);
}

LossAndDivisor bce_with_logits(const Tensor& input, const Tensor& target, OptionalTensor weight,
                               OptionalTensor pos_weight, int64_t reduction, OptionalIndex ignore_index, bool,
                               OptionalBool grad_in_forward, OptionalTensor grad_scale, bool inplace) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKeys);
  return FUSEDLOSS_OPERATOR(bce_with_logits)
      .call(input, target, weight, pos_weight, reduction, ignore_index, true, grad_in_forward, grad_scale, inplace);
}

LossAndDivisor bce(const Tensor& input, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   OptionalIndex ignore_index, bool, OptionalBool grad_in_forward, OptionalTensor grad_scale) {
  TORCH_CHECK(!input.is_cuda(),
              "binary_cross_entropy is unsafe to autocast on CUDA, as in native torch: the sigmoid before it loses the "
              "loss in half precision. Use binary_cross_entropy_with_logits, or leave autocast for this call.");
  c10::impl::ExcludeDispatchKeyGuard no_autocast(kAutocastKeys);
  return FUSEDLOSS_OPERATOR(bce).call(input, target, weight, reduction, ignore_index, true, grad_in_forward,
                                      grad_scale);
}

}  // namespace fusedloss::autocast
