// The table of the CUDA kernels.

#include "../../math/bce.h"
#include "../../math/bce_with_logits.h"
#include "device.h"
#include "memory.cuh"

namespace fusedloss::cuda {

// Those that are templates are instantiated in a file for each type.
template <class T>
void launch_cross_entropy(const CrossEntropyArgs& args, Pass pass, const Allocate& allocate, void* stream);
template <class T>
std::int64_t resident_blocks_of(const Step& step);
void launch_nll(const NllArgs& args, Pass pass, const Allocate& allocate, void* stream);
template <class Loss>
void launch_elementwise(const ElementwiseArgs& args, Pass pass, const Allocate& allocate, void* stream);

const Kernels kKernels{
    .cross_entropy = {[](const CrossEntropyArgs& args, Pass pass, const Allocate& allocate, void* stream) {
      with_floating(args.logits.dtype, [&]<class T>() { launch_cross_entropy<T>(args, pass, allocate, stream); });
    }},
    .nll = {launch_nll},
    .bce_with_logits = {launch_elementwise<math::BceWithLogits>},
    .bce = {launch_elementwise<math::Bce>},
};

std::vector<std::int64_t> class_borders(const ClassProblem& problem, std::int64_t most) {
  ResidentBlocks resident_blocks = nullptr;
  with_floating(problem.dtype, [&]<class T>() { resident_blocks = resident_blocks_of<T>; });
  return class_borders(problem, most, current_device(), resident_blocks);
}

}  // namespace fusedloss::cuda
