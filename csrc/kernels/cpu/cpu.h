// The CPU kernels: a table for each instruction set, and how a pass of a loss is run.

#pragma once

#include <cstdint>

#include "../losses.h"
#include "block_kernel.h"

namespace fusedloss::cpu {

enum class InstructionSet { baseline, avx2, avx512 };

// The widest table that exists in this build and needs no more than `set`.
const Losses<Loss>& kernels(InstructionSet set);

// Runs a pass, on the caller's threads. Returns the first position whose target or value is invalid, or -1. Where there
// is one, no total is written, and no gradient: it might lie over the logits.
template <class Args>
std::int64_t launch(const Loss<Args>& loss, const Args& args, Pass pass, ParallelFor parallel_for);

}  // namespace fusedloss::cpu
