#include "../../math/bce.h"
#include "elementwise.cuh"

namespace fusedloss::cuda {

template void launch_elementwise<math::Bce>(const ElementwiseArgs&, Pass, const Allocate&, void*);

}  // namespace fusedloss::cuda
