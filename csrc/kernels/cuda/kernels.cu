// The table of the CUDA kernels.

#include "../../math/bce.h"
#include "../../math/bce_with_logits.h"
#include "arena.h"
#include "cuda.h"
#include "memory.cuh"

namespace fusedloss::cuda {

// Each launches, or only learns how much workspace it needs. Those that are templates are instantiated in a file for
// each type.
template <class T>
void launch_cross_entropy(const CrossEntropyArgs& args, Pass pass, Arena& arena, void* stream);
void launch_nll(const NllArgs& args, Pass pass, Arena& arena, void* stream);
template <class Loss>
void launch_elementwise(const ElementwiseArgs& args, Pass pass, Arena& arena, void* stream);

namespace {

void launch_cross_entropy_of(const CrossEntropyArgs& args, Pass pass, Arena& arena, void* stream) {
  with_floating(args.logits.dtype, [&]<class T>() { launch_cross_entropy<T>(args, pass, arena, stream); });
}

template <class Args, void (*kRun)(const Args&, Pass, Arena&, void*)>
std::size_t workspace_bytes(const Args& args, Pass pass) {
  Arena arena;
  kRun(args, pass, arena, nullptr);
  return arena.used();
}

template <class Args, void (*kRun)(const Args&, Pass, Arena&, void*)>
void launch(const Args& args, Pass pass, void* workspace, void* stream) {
  Arena arena(workspace);
  kRun(args, pass, arena, stream);
}

template <class Args, void (*kRun)(const Args&, Pass, Arena&, void*)>
std::vector<PlannedLaunch> plan(const Args& args, Pass pass) {
  std::vector<PlannedLaunch> launches;
  Arena arena(&launches);
  kRun(args, pass, arena, nullptr);
  return launches;
}

template <class Args, void (*kRun)(const Args&, Pass, Arena&, void*)>
constexpr Loss<Args> kLoss{workspace_bytes<Args, kRun>, launch<Args, kRun>, plan<Args, kRun>};

}  // namespace

const Kernels kKernels{
    .cross_entropy = kLoss<CrossEntropyArgs, launch_cross_entropy_of>,
    .nll = kLoss<NllArgs, launch_nll>,
    .bce_with_logits = kLoss<ElementwiseArgs, launch_elementwise<math::BceWithLogits>>,
    .bce = kLoss<ElementwiseArgs, launch_elementwise<math::Bce>>,
};

}  // namespace fusedloss::cuda
