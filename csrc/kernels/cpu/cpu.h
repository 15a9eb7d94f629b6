// The CPU kernels: one table of functions for each instruction set, and the choice between them.
//
// Work is cut into blocks; a kernel runs the blocks [begin, end), and different ranges may run on different threads.

#pragma once

#include <cstdint>

#include "../class_loss.h"
#include "../elementwise.h"

namespace fusedloss::cpu {

template <class Args>
using Kernel = void (*)(const Args& args, std::int64_t begin, std::int64_t end);

template <class Args>
struct Loss {
  Kernel<Args> forward;  // with the gradient, if args has a place for it
  Kernel<Args> backward;
  Kernel<Args> count = nullptr;  // the divisor of the mean alone, and what is invalid
};

struct Kernels {
  Loss<CrossEntropyArgs> cross_entropy;
  Loss<NllArgs> nll;
  Loss<ElementwiseArgs> bce_with_logits;
  Loss<ElementwiseArgs> bce;
};

enum class InstructionSet { baseline, avx2, avx512 };

// The widest table that exists in this build and needs no more than `set`.
const Kernels& kernels(InstructionSet set);

// How many blocks the work has. A function of the shape alone, never of the number of threads.
std::int64_t block_count(const CrossEntropyArgs& args);
std::int64_t block_count(const NllArgs& args);
std::int64_t block_count(const ElementwiseArgs& args);

}  // namespace fusedloss::cpu
