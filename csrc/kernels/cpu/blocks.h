// How the CPU kernels cut their work: a table of sizes, and which block holds what.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../class_loss.h"
#include "../elementwise.h"

namespace fusedloss::cpu {

// Entries of a row converted at a time: two buffers of doubles fit in the first-level cache.
inline constexpr int kChunk = 1024;
// Ragged chunks are padded to a multiple of this: the widest vector, so that none of a short row is done one by one.
inline constexpr int kPadding = 16;
// Positions treated together. In column order they are the lanes of the vector loops.
inline constexpr int kLanes = 256;
// Elements of a tile of (classes, lanes) in column order: as float32, half of a second-level cache of 1 MB.
inline constexpr std::int64_t kTileElements = 131072;
// Exponentials added up at a time: four vectors of the widest kind.
inline constexpr int kSumRun = 64;
// Elements in a block: large enough to hide the start of a thread, small enough to balance.
inline constexpr std::int64_t kBlockElements = 32768;
// Rows shorter than this leave most lanes of a vector loop over classes idle; lanes across positions do better.
inline constexpr std::int64_t kRowClasses = 64;

// Row order runs along the classes of one position, column order along positions.
inline bool row_order(const ClassShape& shape, const ClassTensor& tensor) {
  return tensor.class_stride == 1 && shape.classes >= kRowClasses;
}

inline std::int64_t column_lanes(std::int64_t classes) {
  const std::int64_t fitting = kTileElements / std::max<std::int64_t>(classes, 1) / kPadding * kPadding;
  return std::clamp<std::int64_t>(fitting, kPadding, kLanes);
}

inline std::int64_t positions_per_block(const CrossEntropyArgs& args) {
  const std::int64_t by_size = kBlockElements / std::max<std::int64_t>(args.shape.classes, 1);
  const std::int64_t least = row_order(args.shape, args.logits) ? 1 : column_lanes(args.shape.classes);
  return std::max(by_size, least);
}

inline std::int64_t positions_per_block(const NllArgs&) { return kBlockElements / 8; }

// Elements of one block, and of one turn of the vector loop.
inline constexpr std::int64_t kElementwiseBlock = kBlockElements / 2;
inline constexpr int kElementwiseRun = 512;

}  // namespace fusedloss::cpu
