// Where the CUDA launches of a cross entropy change, for the tests in Python. No header of torch is included here.

#pragma once

#include "../kernels/cuda/cuda.h"

namespace fusedloss::ops {

// The borders on the current device (csrc/kernels/cuda/cuda.h). Raises in a build without CUDA kernels.
std::vector<std::int64_t> cuda_class_borders(const cuda::ClassProblem& problem, std::int64_t most);

}  // namespace fusedloss::ops
