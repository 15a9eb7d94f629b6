// The table of the CUDA kernels.

#include "device.h"
#include "packets.cuh"

namespace fusedloss::cuda {

// Those that are templates are instantiated in a file for each type or formula.
template <class T>
void launch_cross_entropy(const CrossEntropyArgs& args, Pass pass, const Allocate& allocate, void* stream);
template <class T>
std::int64_t resident_blocks_of(const Step& step);
void launch_nll(const NllArgs& args, Pass pass, const Allocate& allocate, void* stream);
template <class Formula>
void launch_elementwise(const ElementwiseArgs& args, Pass pass, const Allocate& allocate, void* stream);

constinit const Losses<Loss> kKernels = Losses<Loss>::make(
    {[](const CrossEntropyArgs& args, Pass pass, const Allocate& allocate, void* stream) {
      with_floating(args.logits.dtype, [&]<class T>() { launch_cross_entropy<T>(args, pass, allocate, stream); });
    }},
    {launch_nll},
    []<class Formula>(Formula) -> Loss<ElementwiseArgs> { return {.launch = launch_elementwise<Formula>}; });

std::vector<std::int64_t> class_borders(const ClassProblem& problem, std::int64_t most) {
  ResidentBlocks resident_blocks = nullptr;
  with_floating(problem.dtype, [&]<class T>() { resident_blocks = resident_blocks_of<T>; });
  return class_borders(problem, most, current_device(), resident_blocks);
}

}  // namespace fusedloss::cuda
