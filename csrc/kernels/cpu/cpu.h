// The CPU kernels: one table of functions for each instruction set, and the choice between them.
//
// Work is cut into blocks; a kernel runs the blocks [begin, end), and different ranges may run on different threads.

#pragma once

#include <cstdint>
#include <optional>

#include "../class_loss.h"
#include "../elementwise.h"

namespace fusedloss::cpu {

// What one block of positions adds to the reduced loss. Blocks have a size that depends on the shape alone and are
// added in order, so a result is bitwise the same from run to run and for every number of threads.
struct Partial {
  double loss = 0;
  double divisor = 0;         // of the mean: positions or weights that count
  std::int64_t invalid = -1;  // the first position whose target cannot be read as a class, or whose value is refused
};

inline Partial reduce(const Partial* partials, std::int64_t count) {
  Partial total;
  for (std::int64_t i = 0; i < count; ++i) {
    total.loss += partials[i].loss;
    total.divisor += partials[i].divisor;
    if (total.invalid < 0) total.invalid = partials[i].invalid;
  }
  return total;
}

// partials: one for each block of the work, in the forward kernels; null in backward.
template <class Args>
using Kernel = void (*)(const Args& args, Partial* partials, std::int64_t begin, std::int64_t end);

template <class Args>
struct Loss {
  Kernel<Args> forward;  // with the gradient, if args has a place for it
  Kernel<Args> backward;
  Kernel<Args> count = nullptr;  // the divisor of the mean alone, and what is invalid: before a gradient is written
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

// Writes the reduced loss and the divisor, where they are wanted.
void finish(const Partial& partial, const Total& total);

// The divisor of the mean, where it is known before a position has been looked at.
template <class Args>
std::optional<double> known_divisor(const Args&) {
  return std::nullopt;
}
inline std::optional<double> known_divisor(const ElementwiseArgs& args) {
  return args.has_ignore_index ? std::nullopt : std::optional(static_cast<double>(args.shape.numel));
}

// How many blocks the work has. A function of the shape alone, never of the number of threads.
std::int64_t block_count(const CrossEntropyArgs& args);
std::int64_t block_count(const NllArgs& args);
std::int64_t block_count(const ElementwiseArgs& args);

}  // namespace fusedloss::cpu
