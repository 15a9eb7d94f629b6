#include "cpu.h"

#include <cstdlib>
#include <new>

#include "../../math/reduction.h"
#include "blocks.h"
#include "memory.h"
#include "scratch.h"

namespace fusedloss::cpu {

extern const Kernels kBaseline;
extern const Kernels kAvx2;
extern const Kernels kAvx512;

const Kernels& kernels([[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return kAvx512;
  if (set == InstructionSet::avx2) return kAvx2;
#endif
  return kBaseline;
}

void* scratch(std::size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    std::size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    const std::size_t line = 64, rounded = (bytes + line - 1) / line * line;
    std::free(buffer.data);
    buffer = {};
    buffer.data = std::aligned_alloc(line, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

void finish(const Partial& partial, const Total& total) {
  if (total.divisor) *total.divisor = partial.divisor;
  if (!total.loss) return;
  const double loss = math::reduced(total.reduction == Reduction::mean, partial.loss, partial.divisor);
  store(total.loss, total.dtype, 0, 1, 1, &loss);
}

std::int64_t block_count(const CrossEntropyArgs& args) {
  return ceil_div(args.shape.positions(), positions_per_block(args));
}

std::int64_t block_count(const NllArgs& args) { return ceil_div(args.shape.positions(), positions_per_block(args)); }

std::int64_t block_count(const ElementwiseArgs& args) { return ceil_div(args.shape.numel, kBlockElements); }

}  // namespace fusedloss::cpu
