// The CPU kernels as the checks of the CUDA kernels call them: a whole pass at a time.

#pragma once

#include "kernels/cuda/cuda.h"

struct CpuReference {
  void (*cross_entropy)(const fusedloss::CrossEntropyArgs& args, fusedloss::Pass pass);
  void (*nll)(const fusedloss::NllArgs& args, fusedloss::Pass pass);
  void (*bce_with_logits)(const fusedloss::ElementwiseArgs& args, fusedloss::Pass pass);
  void (*bce)(const fusedloss::ElementwiseArgs& args, fusedloss::Pass pass);
};

// In the library of the CPU kernels. Where the checks are compiled for an emulator, which takes all of its sources for
// device code, that library is loaded beside them, and this is what they are handed.
extern "C" [[gnu::visibility("default")]] const CpuReference* fusedloss_cpu_reference();
