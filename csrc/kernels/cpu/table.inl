// All CPU kernels, compiled for the instruction set that the including file has switched on, as the table it names.

#include "cpu.h"

#include "cross_entropy.inl"
#include "elementwise.inl"
#include "nll.inl"

namespace fusedloss::cpu {

extern const Losses<Loss> FUSEDLOSS_TABLE;
const Losses<Loss> FUSEDLOSS_TABLE = {
    .cross_entropy = {cross_entropy_forward, cross_entropy_backward, cross_entropy_count},
    .nll = {nll_forward, nll_backward},
    .bce_with_logits = {elementwise_forward<math::BceWithLogits>, elementwise_backward<math::BceWithLogits>,
                        elementwise_count},
    .bce = {elementwise_forward<math::Bce>, elementwise_backward<math::Bce>, elementwise_count},
};

}  // namespace fusedloss::cpu
