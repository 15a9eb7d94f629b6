#include "cross_entropy_launch.cuh"

namespace fusedloss::cuda {

template void launch_cross_entropy<Float16>(const CrossEntropyArgs&, Pass, const Allocate&, void*);
template std::int64_t resident_blocks_of<Float16>(const Step&);

}  // namespace fusedloss::cuda
