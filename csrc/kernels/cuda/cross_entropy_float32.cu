#include "cross_entropy_launch.cuh"

namespace fusedloss::cuda {

template void launch_cross_entropy<float>(const CrossEntropyArgs&, Pass, Arena&, void*);

}  // namespace fusedloss::cuda
