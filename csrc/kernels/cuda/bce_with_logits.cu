#include "../../math/bce_with_logits.h"
#include "elementwise.cuh"

namespace fusedloss::cuda {

template void launch_elementwise<math::BceWithLogits>(const ElementwiseArgs&, Pass, const Allocate&, void*);

}  // namespace fusedloss::cuda
