// The CPU kernels as the checks of the CUDA kernels call them.

#pragma once

#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"

// One loss: reference.NAME(args, pass) runs a pass.
template <class Args>
struct ReferenceLoss {
  const fusedloss::cpu::Loss<Args>* loss;
  void (*run)(const fusedloss::cpu::Loss<Args>& loss, const Args& args, fusedloss::Pass pass);

  void operator()(const Args& args, fusedloss::Pass pass) const { run(*loss, args, pass); }
};

using CpuReference = fusedloss::Losses<ReferenceLoss>;

// In the library of the CPU kernels. Where the checks are compiled for an emulator, which takes all of its sources for
// device code, that library is loaded beside them, and this is what they are handed.
extern "C" [[gnu::visibility("default")]] const CpuReference* fusedloss_cpu_reference();
