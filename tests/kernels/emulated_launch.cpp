// Takes the place of csrc/ops/cuda_seam.cpp in a build that is for tests alone (emulate_operators.py): tensors of the
// CPU go to the CUDA kernels, which an emulator runs there. What it finds (a barrier that not all threads reach, an
// access out of bounds, an assertion) is raised.

#include "ops/launch.h"

#include <string>

extern "C" const char* emu_report();  // of the emulator: what it has found since the last call
extern "C" void emulated_poison();    // of the script: see there

namespace fusedloss {

namespace cuda {
template <class Formula>
void launch_elementwise(const ElementwiseArgs& args, Pass pass, const Allocate& allocate, void* stream);
}

namespace ops {
namespace {

void raise_what_was_found() {
  const std::string found = emu_report();
  TORCH_CHECK(found.empty(), "emulated: ", found);
}

template <class Args, auto kLaunch>
void checked(const Args& args, Pass pass, const cuda::Allocate& allocate, void* stream) {
  emulated_poison();
  try {
    kLaunch(args, pass, allocate, stream);
  } catch (const std::exception&) {
    raise_what_was_found();
    throw;
  }
  raise_what_was_found();
}

}  // namespace

bool runs_on_cuda(const at::Tensor&) { return true; }

const Losses<cuda::Loss>& cuda_kernels() {
  static const auto kernels = Losses<cuda::Loss>::make(
      {checked<CrossEntropyArgs, [](const auto&... all) { cuda::kKernels.cross_entropy.launch(all...); }>},
      {checked<NllArgs, [](const auto&... all) { cuda::kKernels.nll.launch(all...); }>},
      []<class Formula>(Formula) -> cuda::Loss<ElementwiseArgs> {
        return {.launch = checked<ElementwiseArgs, cuda::launch_elementwise<Formula>>};
      });
  return kernels;
}

void cuda_rescale(const cuda::RescaleArgs& args, void* stream) {
  cuda::rescale(args, stream);
  raise_what_was_found();
}

std::vector<int64_t> cuda_class_borders(const cuda::ClassProblem& problem, int64_t most) {
  return cuda::class_borders(problem, most);
}

void* current_stream(at::Device) { return nullptr; }

}  // namespace ops
}  // namespace fusedloss
