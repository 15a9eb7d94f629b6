#include "cross_entropy_launch.cuh"

namespace fusedloss::cuda {

template void launch_cross_entropy<double>(const CrossEntropyArgs&, Pass, const Allocate&, void*);
template std::int64_t resident_blocks_of<double>(const Step&);

}  // namespace fusedloss::cuda
