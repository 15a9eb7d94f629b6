// All CPU kernels, compiled for the instruction set that the including file has switched on, as the table it names.

#include "cpu.h"

#include "cross_entropy.inl"
#include "elementwise.inl"
#include "nll.inl"

namespace fusedloss::cpu {

extern const Losses<Loss> FUSEDLOSS_TABLE;
constinit const Losses<Loss> FUSEDLOSS_TABLE =
    Losses<Loss>::make({cross_entropy_forward, cross_entropy_backward, cross_entropy_count, cross_entropy_split},
                       {nll_forward, nll_backward}, []<class Formula>(Formula) -> Loss<ElementwiseArgs> {
                         return {elementwise_forward<Formula>, elementwise_backward<Formula>, elementwise_count};
                       });

}  // namespace fusedloss::cpu
