#include "cross_entropy_launch.cuh"

namespace fusedloss::cuda {

template void launch_cross_entropy<BFloat16>(const CrossEntropyArgs&, Pass, const Allocate&, void*);
template std::int64_t resident_blocks_of<BFloat16>(const Step&);

}  // namespace fusedloss::cuda
