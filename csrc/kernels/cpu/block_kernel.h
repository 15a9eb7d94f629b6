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

// A part [begin, end) of a pass.
struct Work {
  void (*run)(const void* pass, std::int64_t begin, std::int64_t end);
  const void* pass;

  void operator()(std::int64_t begin, std::int64_t end) const { run(pass, begin, end); }

  // That calls body, which must outlive it.
  template <class Body>
  static Work of(const Body& body) {
    return {
        [](const void* pass, std::int64_t begin, std::int64_t end) { (*static_cast<const Body*>(pass))(begin, end); },
        &body};
  }
};

// Calls work(begin, end) for ranges that make up [0, count), on any threads, and waits for them.
using ParallelFor = void (*)(std::int64_t count, const Work& work);

// partials: one for each block of the work; null in backward.
template <class Args>
using BlockKernel = void (*)(const Args& args, Partial* partials, std::int64_t begin, std::int64_t end);

template <class Args>
struct Loss {
  BlockKernel<Args> forward;  // with the gradient, if args has a place for it
  BlockKernel<Args> backward;
  BlockKernel<Args> count = nullptr;  // the mean's divisor alone, and what is invalid: before a gradient is written
  // Of rows that are split (splits_rows in blocks.h): forward, or backward if partial is null, which calls
  // parallel_for. shared: of shared_bytes bytes.
  void (*split)(const Args& args, Partial* partial, void* shared, ParallelFor parallel_for) = nullptr;
};

}  // namespace fusedloss::cpu
