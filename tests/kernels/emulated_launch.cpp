// Takes the place of csrc/ops/launch.cpp in a build that is for tests alone (emulate_operators.py): tensors of the CPU
// go to the CUDA kernels, which an emulator runs there. What it finds (a barrier that not all threads reach, an access
// out of bounds, an assertion) is raised.

#include "ops/launch.h"

#include <string>

extern "C" const char* emu_report();  // of the emulator: what it has found since the last call
extern "C" void emulated_poison();    // of the script: see there

namespace fusedloss::ops {
namespace {

void raise_what_was_found() {
  const std::string found = emu_report();
  TORCH_CHECK(found.empty(), "emulated: ", found);
}

template <class Args, cuda::Loss<Args> cuda::Kernels::* kLoss>
void launch(const Args& args, Pass pass, const cuda::Allocate& allocate, void* stream) {
  emulated_poison();
  try {
    (cuda::kKernels.*kLoss).launch(args, pass, allocate, stream);
  } catch (const std::exception&) {
    raise_what_was_found();
    throw;
  }
  raise_what_was_found();
}

}  // namespace

bool runs_on_cuda(const at::Tensor&) { return true; }

const cuda::Kernels& cuda_kernels() {
  static const cuda::Kernels kernels{
      .cross_entropy = {launch<CrossEntropyArgs, &cuda::Kernels::cross_entropy>},
      .nll = {launch<NllArgs, &cuda::Kernels::nll>},
      .bce_with_logits = {launch<ElementwiseArgs, &cuda::Kernels::bce_with_logits>},
      .bce = {launch<ElementwiseArgs, &cuda::Kernels::bce>},
  };
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

}  // namespace fusedloss::ops
