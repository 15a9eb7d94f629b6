// What a pass of cross entropy launches, decided before anything is launched: a function of the arguments, of a few
// facts about the device and of how many blocks it holds at once. No CUDA header is needed to include this file:
// tests/cpp/test_plans.cpp states the plans for a device that is not there.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <variant>
#include <vector>

#include "cuda.h"

namespace fusedloss::cuda {

// --- What launcher and kernels agree on ---

inline constexpr int kWarp = 32;
inline constexpr int kPacketBytes = 16;
inline constexpr int kDivisorThreads = 1024;
inline constexpr int kTileThreads = 256;
inline constexpr std::int64_t kTileClasses = 1024;  // the most
// The most classes of a row of tiles that one lane has, or four lanes, in registers: tiles are compiled for both.
inline constexpr int kOneLaneClasses = 16, kFewLanes = 4, kFewLanesClasses = 128;
constexpr int row_threads(std::size_t logit_bytes) { return logit_bytes > 4 ? 512 : 1024; }  // the most
inline constexpr int kWarpRowThreads = 128;                                                  // where a warp has a row
inline constexpr int kFewWarpLogits = 32, kMostWarpLogits = 64;  // of a lane then: warps are compiled for both
inline constexpr int kFewestWarpLanes = 8;                       // of a row
inline constexpr int kColumnThreads = 128;                       // the most

// Blocks of one cluster that every device with clusters can launch.
inline constexpr int kLargestCluster = 8;

struct Division {  // of numbers below 2^16 by one of at most kTileClasses
  unsigned divisor = 1;
  unsigned reciprocal = 0;  // of 2^32, rounded up

  static constexpr Division by(unsigned divisor) {
    return {divisor, divisor > 1 ? static_cast<unsigned>(((std::uint64_t(1) << 32) + divisor - 1) / divisor) : 0};
  }
#if defined(__CUDACC__)
  __device__ __forceinline__ int operator()(int n) const { return divisor > 1 ? __umulhi(n, reciprocal) : n; }
#endif
};

struct TilePlan {
  std::int64_t tiles = 0;
  int lanes = 1;             // of a row
  int rows = 1;              // of a tile; several times kTileThreads / lanes
  int pitch = 1;             // from row to row in shared memory
  int start = 0;             // of the first row in shared memory: its place in a packet
  bool stream = false;       // the logits' rows follow one another in memory
  bool grad_stream = false;  // the gradient's likewise, and it starts at the same place in a packet
  Division classes;

  // In shared memory, with room behind the last row: the next tile starts where a packet does.
  constexpr std::size_t elements() const { return std::size_t(start + rows * pitch + 2 * kPacketBytes) / 16 * 16; }
};

struct WarpPlan {
  int lanes = kWarp;        // of a row
  bool from_start = false;  // packets are counted from the first class on, wherever that lies in memory
};

struct RowPlan {
  int slices = 1;  // of a row, each read by one block; of a cluster, where there are clusters
  int slice_packets = 0;
  bool from_start = false;      // packets are counted from the first class on, wherever that lies in memory
  void* parts = nullptr;        // (positions, slices) RowStatistics, where slices meet through memory
  unsigned* tickets = nullptr;  // (positions,), zero when the kernel starts
};

struct ColumnPlan {
  bool keeps = false;      // all packets of an item wait in shared memory
  std::int64_t items = 0;  // packets of positions
};

// --- The device ---

// No kernel has more static shared memory (tools/kernel_resources.py holds the compiled ones to it). Dynamic shared
// memory is planned beside it: a launch whose sum exceeds what a block can have fails.
inline constexpr std::size_t kStaticSharedBytes = 4 * 1024;

struct Device {
  int multiprocessors;
  std::size_t dynamic_shared;  // the most bytes that a launch here may ask for
  std::size_t shared_per_multiprocessor;
  int largest_cluster;  // of blocks that can read each other's shared memory; 1: there are no clusters
};

// The shape of a launch.
struct Launch {
  std::int64_t blocks = 1;
  int threads = 128;
  std::size_t shared_bytes = 0;  // dynamic
  int cluster = 1;               // blocks in a cluster; 1 needs no device that has them
};

// Blocks that take turns at the work: as many as there are units of it, and no more than are resident at once. One more
// would start when others end, and the device would wait for it.
constexpr std::int64_t blocks_for(std::int64_t units, std::int64_t resident) {
  return std::max<std::int64_t>(1, std::min(units, resident));
}

// --- The workspace ---

// The sizes of a ticket, of a block's Sums, and of the statistics of a slice.
inline constexpr std::size_t kTicketBytes = 4, kSumsBytes = 16;
constexpr std::size_t statistics_bytes(std::size_t logit_bytes, bool general) {
  return !general ? 8 : logit_bytes > 4 ? 56 : 48;  // cross_entropy.cuh: PartStatistics
}

struct Piece {
  std::size_t offset = 0, bytes = 0;  // no bytes: the piece is absent
};

// Where the blocks of a grid leave their sums (reduce.cuh: GridSums).
struct GridPieces {
  std::int64_t units = 1;
  Piece ticket, parts;
};

struct Workspace {
  std::size_t bytes = 0;

  // Pieces are aligned to 16 bytes, and follow one another in the order in which they are taken.
  Piece take(std::int64_t count, std::size_t size) {
    if (count == 0) return {};
    const Piece piece{(bytes + 15) / 16 * 16, static_cast<std::size_t>(count) * size};
    bytes = piece.offset + piece.bytes;
    return piece;
  }
  // One unit needs nothing: a small problem is one launch.
  GridPieces take_grid(std::int64_t units) {
    if (units == 1) return {};
    const Piece ticket = take(1, kTicketBytes);
    return {units, ticket, take(units, kSumsBytes)};
  }
};

// --- The plan ---

struct DivisorPlan {};  // the divisor of the mean, counted for the step that follows

// The launch of one kernel.
struct Step {
  std::variant<DivisorPlan, TilePlan, WarpPlan, RowPlan, ColumnPlan> plan;
  Pass pass = Pass::forward;
  bool general = false;  // entries need more than their logit, or more is wanted of them: see plan.cpp
  int variant = 0;  // the kernel's last template argument: lanes of tiles, logits of a lane of a whole warp, whether
                    // rows have clusters, the width of columns
  bool answers = false;  // of rows that are not general: with an entropy, or the class of the largest logit
  Launch shape = {};
  GridPieces grid = {};                    // of the total
  Piece row_tickets = {}, row_parts = {};  // where slices of a row meet through memory
};

struct CrossEntropyPlan {
  std::vector<Step> steps;
  bool reads_twice = false;  // a gradient in forward takes two steps, forward and backward
  // What a step leaves for the next: the divisor that was counted, or what backward reads where rows are read twice.
  Piece counted, row_max, row_log_sum, divisor;
  Workspace workspace;
};

// How many blocks of a step's kernel and shape the device holds at once; 0 where it has no place for a cluster of them,
// or the kernel is not compiled for clusters.
using ResidentBlocks = std::int64_t (*)(const Step& step);

// A plan depends on which addresses in the arguments are null, and on how the others are aligned.
CrossEntropyPlan plan_cross_entropy(const CrossEntropyArgs& args, Pass pass, const Device& device,
                                    ResidentBlocks resident_blocks);

// The borders between plans for such a device (cuda.h).
std::vector<std::int64_t> class_borders(const ClassProblem& problem, std::int64_t most, const Device& device,
                                        ResidentBlocks resident_blocks);

}  // namespace fusedloss::cuda
