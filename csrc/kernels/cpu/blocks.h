// How the CPU kernels cut their work: a table of sizes, and which block holds what.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../class_loss.h"
#include "../elementwise.h"

namespace fusedloss::cpu {

// Entries of a row converted at a time: two buffers of doubles fit in the first-level cache.
inline constexpr int kChunk = 1024;
// The elements of the widest vector.
inline constexpr int kWidest = 16;
// Positions treated together. In column order they are the lanes of the vector loops.
inline constexpr int kLanes = 256;
// Elements of a tile of (classes, lanes) in column order: as float32, half of a second-level cache of 1 MB.
inline constexpr std::int64_t kTileElements = 131072;

// Elements in a block. The work of one takes a few times as long as waking a thread: measured, two blocks on two
// threads are faster than one from about this size on.
inline constexpr std::int64_t kBlockElements = 8192;
// Rows shorter than this leave most lanes of a vector loop over classes idle; lanes across positions do better.
inline constexpr std::int64_t kRowClasses = 64;

// Row order runs along the classes of one position, column order along positions.
inline bool row_order(const ClassShape& shape, const ClassTensor& tensor) {
  return tensor.class_stride == 1 && shape.classes >= kRowClasses;
}

inline std::int64_t column_lanes(std::int64_t classes) {
  const std::int64_t fitting = kTileElements / std::max<std::int64_t>(classes, 1) / kWidest * kWidest;
  return std::clamp<std::int64_t>(fitting, kWidest, kLanes);
}

inline std::int64_t positions_per_block(const CrossEntropyArgs& args) {
  const std::int64_t by_size = kBlockElements / std::max<std::int64_t>(args.shape.classes, 1);
  const std::int64_t unit = row_order(args.shape, args.logits) ? 1 : column_lanes(args.shape.classes);
  return std::max(by_size / unit * unit, unit);
}

// One entry of a row is read in forward; in backward the whole row is written.
inline std::int64_t positions_per_block(const NllArgs& args) {
  const std::int64_t written = args.grad_log_probs.data ? std::max<std::int64_t>(args.shape.classes, 1) : 1;
  return std::clamp<std::int64_t>(4 * kBlockElements / written, 1, kBlockElements / 8);
}

// Elements of one turn of the vector loop.
inline constexpr int kElementwiseRun = 1024;

// Where there are few rows, and these are long, each is split over threads: what a segment of kSegment classes adds up
// to is merged in order.
inline constexpr std::int64_t kSegment = 64 * kChunk;
inline constexpr std::int64_t kFewRows = 16;

inline bool splits_rows(const CrossEntropyArgs& args) {
  return row_order(args.shape, args.logits) && args.shape.positions() < kFewRows && args.shape.classes >= 4 * kSegment;
}
template <class Args>
bool splits_rows(const Args&) {
  return false;
}

// What the threads share then: what is found of each segment, and the maximum of each chunk.
inline constexpr std::int64_t kFoundBytes = 64;
inline std::int64_t shared_bytes(const CrossEntropyArgs& args) {
  return ceil_div(args.shape.classes, kSegment) * kFoundBytes +
         ceil_div(args.shape.classes, kChunk) * std::int64_t(sizeof(double));
}
template <class Args>
std::int64_t shared_bytes(const Args&) {
  return 0;
}

// How many blocks the work has. A function of the shape alone, never of the number of threads.
template <class Args>
std::int64_t block_count(const Args& args) {
  return ceil_div(args.shape.positions(), positions_per_block(args));
}
inline std::int64_t block_count(const ElementwiseArgs& args) { return ceil_div(args.shape.numel, kBlockElements); }

}  // namespace fusedloss::cpu
