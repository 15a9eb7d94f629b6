#include "cpu.h"

#include "blocks.h"

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

std::int64_t block_count(const CrossEntropyArgs& args) {
  return ceil_div(args.shape.positions(), positions_per_block(args));
}

std::int64_t block_count(const NllArgs& args) { return ceil_div(args.shape.positions(), positions_per_block(args)); }

std::int64_t block_count(const ElementwiseArgs& args) { return ceil_div(args.shape.numel, kElementwiseBlock); }

}  // namespace fusedloss::cpu
