// What a loss brings for an instruction set: kernels that run a range of blocks of its work. Different ranges may run
// on different threads.

#pragma once

#include <cstdint>

namespace fusedloss::cpu {

// What one block of positions adds to the reduced loss. Blocks have a size that depends on the shape alone and are
// added in order, so a result is bitwise the same from run to run and for every number of threads.
struct Partial {
  double loss = 0;
  double divisor = 0;         // of the mean: positions or weights that count
  std::int64_t invalid = -1;  // the first position whose target cannot be read as a class, or whose value is refused
};

// partials: one for each block of the work; null in backward.
template <class Args>
using BlockKernel = void (*)(const Args& args, Partial* partials, std::int64_t begin, std::int64_t end);

template <class Args>
struct Loss {
  BlockKernel<Args> forward;  // with the gradient, if args has a place for it
  BlockKernel<Args> backward;
  BlockKernel<Args> count = nullptr;  // the mean's divisor alone, and what is invalid: before a gradient is written
};

}  // namespace fusedloss::cpu
