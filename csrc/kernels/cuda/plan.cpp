// Which traversal suits a problem, and how it is launched: tiles, warps, rows or columns, and the divisor before them.

#include "plan.h"

#include <optional>

namespace fusedloss::cuda {
namespace {

// Up to this many positions every block counts the mean's divisor for itself. Beyond, and where positions have weights
// of their own, whose types are many, a launch of its own counts them: one block, which needs no ticket, as long as its
// threads wait for no more than four times the indices that they ask for at once, and then as many blocks as have to
// wait once.
constexpr std::int64_t kCountedInline = 256;
constexpr std::int64_t kCountedAtOnce = 8 * kDivisorThreads;
constexpr std::int64_t kCountedByOneBlock = 4 * kCountedAtOnce;

// Lanes of a row in the general code, by its number of classes: the first entry whose limit is not below it.
struct TileGeometry {
  int classes, lanes;
};
constexpr TileGeometry kTileGeometry[] = {{16, 1}, {32, 2}, {64, 4}, {128, 8}, {256, 16}, {kTileClasses, 32}};
constexpr std::int64_t kTileBytes = 24 * 1024;  // the most, where a thread has more than one row
constexpr std::int64_t kTilesAtOnce = 4;        // of a multiprocessor
constexpr int kBankBytes = 4;                   // of shared memory

// Threads of a block, by the bytes of a row's slice: the first entry whose limit is not below them.
struct RowGeometry {
  std::int64_t bytes;
  int threads;
};
constexpr RowGeometry kRowGeometry[] = {
    {8 * 1024, 128}, {32 * 1024, 256}, {96 * 1024, 512}, {std::int64_t(1) << 62, row_threads(kBankBytes)}};
// Where nothing is kept a second block has room beside each, and reads while the first waits for its row's sums.
constexpr int kPassingThreads = 512;

// Bytes: what is worth a block of its own, and what leaves room for a second and third block beside it, so that one
// reads while another writes.
constexpr std::int64_t kSmallestSlice = 8 * 1024;
constexpr std::int64_t kPreferredShare = 68 * 1024;

// Packets of positions for each multiprocessor: with fewer, most of the device would be idle.
constexpr std::int64_t kFewestPackets = 8;
// Bytes: the fewest that are copied to shared memory asynchronously, and what a block has there beside its packets.
constexpr int kNarrowPacket = 4;
constexpr std::size_t kBesidePackets = 2 * 1024;
// Warps of a multiprocessor whose packets are kept: fewer could not start instructions as quickly as logits arrive.
constexpr int kFewestKeepingWarps = 8;

int bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

struct Problem {
  const CrossEntropyArgs& args;
  Pass pass;
  const Device& device;
  ResidentBlocks resident_blocks;
  bool totals = pass != Pass::backward && (args.total.loss || args.total.divisor);
  std::int64_t classes = args.shape.classes, positions = args.shape.positions();
  int logit_bytes = bytes_of(args.logits.dtype), width = kPacketBytes / logit_bytes;
  // Entries need more than their logit. float64 has the general kernels alone: half the code, for a type that is for
  // checking.
  bool rich_entries =
      args.logits.dtype == Dtype::float64 || args.has_probabilities || args.label_smoothing != 0 || args.transforms();
  // More is wanted of them than the sum of their exponentials.
  bool answers = pass != Pass::backward && (args.entropy || args.argmax);
  bool rich_rows = rich_entries || answers || (pass == Pass::backward && args.grad_entropy) ||
                   (pass == Pass::forward_with_gradient && args.every_row);  // a row may have no gradient, and be read
  bool general = rich_rows || args.all_classes != 0;  // without which only rows know of other classes
  // What is known of a row is the same to the bit, whatever else is in the batch, and wherever the row lies: where it
  // is not added to the others', someone may compare it.
  bool invariant = pass == Pass::forward && args.loss.data;

  // Blocks take turns at so many units of work, and each leaves its part of the total.
  void set_blocks(Step& step, std::int64_t units, Workspace& workspace) const {
    step.shape.blocks = blocks_for(units, resident_blocks(step));
    step.grid = workspace.take_grid(totals ? step.shape.blocks : 1);
  }
  // How many logits a tensor starts behind the start of its first packet.
  int misalignment(const ClassTensor& tensor) const {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(tensor.data) % kPacketBytes / logit_bytes);
  }
};

// Nothing where two tiles are more than a block holds, as a thousand float64 classes are on some devices.
std::optional<Step> plan_tiles(const Problem& problem, Workspace& workspace) {
  if (problem.classes > (problem.general ? kTileClasses : kFewLanesClasses)) return {};
  const CrossEntropyArgs& args = problem.args;
  const int classes = static_cast<int>(problem.classes), row_bytes = classes * problem.logit_bytes;
  TilePlan plan;
  if (problem.general) {
    plan.lanes = std::ranges::find_if(kTileGeometry, [&](auto entry) { return classes <= entry.classes; })->lanes;
  } else {
    plan.lanes = classes <= kOneLaneClasses ? 1 : kFewLanes;
  }
  // What a tile costs beside its rows is shared by several of a thread's, where that leaves no multiprocessor idle.
  plan.rows = kTileThreads / plan.lanes;
  const std::int64_t at_once = kTilesAtOnce * problem.device.multiprocessors;
  while (2 * plan.rows * row_bytes <= kTileBytes && 2 * plan.rows * at_once <= problem.positions) plan.rows *= 2;
  plan.tiles = ceil_div(problem.positions, plan.rows);
  plan.classes = Division::by(classes);
  const auto follows = [&](const ClassTensor& tensor) {
    return tensor.class_stride == 1 && args.shape.outer == 1 && tensor.inner_stride == classes;
  };
  plan.stream = follows(args.logits);
  // A tile holds a multiple of 16 bytes (of whole rows of kTileThreads / lanes), so that all tiles start alike.
  plan.start = plan.stream ? problem.misalignment(args.logits) : 0;
  plan.grad_stream = plan.stream && follows(args.grad_logits) && problem.misalignment(args.grad_logits) == plan.start;
  plan.pitch = classes;
  // Rows of a multiple of 16 bytes would start in few of the 32 banks, and lanes of different rows wait for one
  // another.
  if (problem.logit_bytes <= kBankBytes && plan.start == 0 && row_bytes % kPacketBytes == 0 && plan.lanes < kWarp) {
    plan.pitch += kBankBytes / problem.logit_bytes;
  }

  Step step{plan, problem.pass, problem.general, problem.general ? 0 : plan.lanes};
  step.shape = {.threads = kTileThreads, .shared_bytes = 2 * plan.elements() * problem.logit_bytes};
  std::size_t needed = step.shape.shared_bytes;
  if (problem.invariant) {  // the most that any alignment takes decides for all
    TilePlan widest = plan;
    widest.start = problem.width;
    widest.pitch = classes + kBankBytes;
    needed = std::max(needed, 2 * widest.elements() * problem.logit_bytes);
  }
  if (needed > problem.device.dynamic_shared) return {};
  problem.set_blocks(step, plan.tiles, workspace);
  return step;
}

std::optional<Step> plan_warps(const Problem& problem, Workspace& workspace) {
  if (problem.general || problem.classes > kWarp * kMostWarpLogits) return {};
  WarpPlan plan{kFewestWarpLanes, problem.invariant};
  while (plan.lanes < kWarp && problem.classes > plan.lanes * kFewWarpLogits) plan.lanes *= 2;
  Step step{plan, problem.pass};
  if (plan.lanes == kWarp) step.variant = problem.classes <= kWarp * kFewWarpLogits ? kFewWarpLogits : kMostWarpLogits;
  step.shape = {.threads = kWarpRowThreads};
  problem.set_blocks(step, ceil_div(problem.positions, kWarpRowThreads / plan.lanes), workspace);
  return step;
}

// How many slices a row has. A gradient in forward wants the slices of a cluster's blocks small enough for others to
// fit beside them, and as few as that takes; other passes cut rows only where there are fewer than multiprocessors, of
// which each then gets two slices.
int preferred_slices(const Problem& problem, std::int64_t row_bytes) {
  const std::int64_t positions = problem.positions, multiprocessors = problem.device.multiprocessors;
  int slices = 1;
  if (problem.pass == Pass::forward_with_gradient) {
    const auto is_large = [&](std::int64_t bytes) {
      return bytes > kPreferredShare || (slices * positions < multiprocessors && bytes > 2 * kSmallestSlice);
    };
    while (slices < problem.device.largest_cluster && is_large(row_bytes / slices)) slices *= 2;
  } else if (positions < multiprocessors && !problem.invariant &&
             !(problem.pass == Pass::backward && problem.args.has_probabilities)) {
    const std::int64_t most = std::max<std::int64_t>(1, row_bytes / kSmallestSlice);
    slices = static_cast<int>(std::min(ceil_div(2 * multiprocessors, positions), most));
  }
  return slices;
}

// Nothing where forward writes a gradient and shared memory does not hold the rows.
std::optional<Step> plan_rows(const Problem& problem, Workspace& workspace) {
  const std::int64_t packets = ceil_div(problem.classes, problem.width);
  RowPlan plan{.slices = preferred_slices(problem, packets * kPacketBytes), .from_start = problem.invariant};
  Step step{plan, problem.pass, problem.rich_rows};
  if (problem.answers && !problem.rich_entries && problem.pass == Pass::forward) {
    step.general = false;
    step.answers = true;
  }
  std::int64_t resident = 0;
  for (;; plan.slices /= 2) {
    plan.slice_packets = static_cast<int>(ceil_div(packets, plan.slices));
    const std::int64_t bytes = std::int64_t(plan.slice_packets) * kPacketBytes;
    step.shape.threads = std::ranges::find_if(kRowGeometry, [&](auto entry) { return bytes <= entry.bytes; })->threads;
    step.shape.threads = std::min(step.shape.threads, row_threads(problem.logit_bytes));
    if (problem.pass != Pass::forward_with_gradient) {
      step.shape.threads = std::min(step.shape.threads, kPassingThreads);
    } else {
      step.shape.shared_bytes = bytes;
      step.shape.cluster = plan.slices;
      if (step.shape.shared_bytes > problem.device.dynamic_shared) return {};
    }
    step.variant = step.shape.cluster > 1;
    step.plan = plan;
    resident = problem.resident_blocks(step);
    // A part of a device may have no place for so many blocks side by side.
    if (step.shape.cluster == 1 || resident > 0) break;
  }
  // There are few rows whose slices meet through memory, and all of them are on their way at once.
  const bool meets = problem.pass == Pass::forward && plan.slices > 1;
  const std::int64_t at_once = meets ? problem.positions : blocks_for(problem.positions, resident / plan.slices);
  step.shape.blocks = at_once * plan.slices;
  step.grid = workspace.take_grid(problem.totals ? at_once : 1);
  if (meets) {
    step.row_tickets = workspace.take(problem.positions, kTicketBytes);
    step.row_parts = workspace.take(step.shape.blocks, statistics_bytes(problem.logit_bytes, problem.general));
  }
  return step;
}

// The block, of no more threads, that has most warps of a multiprocessor keep their items in shared memory; nothing
// where those are few.
std::optional<Launch> plan_keeping(const Device& device, int threads, std::size_t item_bytes) {
  Launch best;
  std::size_t most = 0;
  for (; threads >= kWarp; threads /= 2) {
    const std::size_t bytes = threads * item_bytes;
    const std::size_t warps = device.shared_per_multiprocessor / (bytes + kBesidePackets) * (threads / kWarp);
    if (bytes > device.dynamic_shared || warps <= most) continue;
    most = warps;
    best = {.threads = threads, .shared_bytes = bytes};
  }
  if (most < kFewestKeepingWarps) return {};
  return best;
}

Step plan_columns(const Problem& problem, Workspace& workspace) {
  const CrossEntropyArgs& args = problem.args;
  const auto has_packets = [&](const ClassTensor& tensor, int width) {
    return !tensor.data || (tensor.inner_stride == 1 && tensor.class_stride % width == 0 &&
                            tensor.outer_stride % width == 0 && problem.misalignment(tensor) % width == 0);
  };
  const auto is_possible = [&](int width) {
    return width == 1 ||
           (!problem.general && problem.positions >= width * kFewestPackets * problem.device.multiprocessors &&
            args.shape.inner % width == 0 && has_packets(args.logits, width) && has_packets(args.grad_logits, width));
  };
  const auto threads_for = [&](int width) {  // fewer of them before multiprocessors have none
    int threads = kColumnThreads;
    if (problem.invariant && args.weight && args.label_smoothing != 0) return threads;  // they add up the weights
    while (threads > kWarp && problem.positions / width < threads * problem.device.multiprocessors) threads /= 2;
    return threads;
  };
  const auto keeping = [&](int width) -> std::optional<Launch> {
    // Where nothing is read twice it pays only if no thread waits for its copies one by one.
    const int packet_bytes = width * problem.logit_bytes;
    const bool reads_once = problem.pass != Pass::forward_with_gradient;
    if (!is_possible(width) || (reads_once && (problem.general || packet_bytes < kNarrowPacket))) return {};
    if (problem.invariant) return {};  // kept packets are added up in another order, and not all can be kept
    return plan_keeping(problem.device, threads_for(width), problem.classes * packet_bytes);
  };
  const int narrow = std::max(1, kNarrowPacket / problem.logit_bytes);
  Step step{.pass = problem.pass, .general = problem.general, .variant = is_possible(narrow) ? narrow : 1};
  step.shape = {.threads = threads_for(step.variant)};
  ColumnPlan plan;
  for (const int width : {1, narrow, problem.width}) {  // the widest that are kept
    if (const auto shape = keeping(width)) {
      plan.keeps = true;
      step.variant = width;
      step.shape = *shape;
    }
  }
  plan.items = problem.positions / step.variant;
  step.plan = plan;
  problem.set_blocks(step, ceil_div(plan.items, step.shape.threads), workspace);
  return step;
}

}  // namespace

CrossEntropyPlan plan_cross_entropy(const CrossEntropyArgs& args, Pass pass, const Device& device,
                                    ResidentBlocks resident_blocks) {
  CrossEntropyPlan plan;
  Workspace& workspace = plan.workspace;
  Problem problem{args, pass, device, resident_blocks};
  if (problem.positions == 0 && !problem.totals) return plan;
  const bool columns = problem.positions == 0 || problem.classes == 0 || args.logits.class_stride != 1 ||
                       (args.grad_logits.data && args.grad_logits.class_stride != 1);
  std::optional<Step> step;
  if (columns) step = plan_columns(problem, workspace);
  if (!step) step = plan_tiles(problem, workspace);
  if (!step) step = plan_warps(problem, workspace);
  if (!step) step = plan_rows(problem, workspace);

  plan.reads_twice = !step;
  if (plan.reads_twice) {  // statistics and divisor go through the workspace
    const std::size_t accumulate_bytes = std::max<std::size_t>(problem.logit_bytes, sizeof(float));
    if (!args.row_max) plan.row_max = workspace.take(problem.positions, accumulate_bytes);
    if (!args.row_log_sum) plan.row_log_sum = workspace.take(problem.positions, accumulate_bytes);
    if (!args.total.divisor) plan.divisor = workspace.take(1, sizeof(double));
    plan.steps.push_back(*plan_rows({args, Pass::forward, device, resident_blocks, true}, workspace));
    step = plan_rows({args, Pass::backward, device, resident_blocks}, workspace);
  } else if (pass == Pass::forward_with_gradient && args.total.reduction == Reduction::mean &&
             !args.total.denominator &&
             (args.sample_weight.data || (!args.has_probabilities && problem.positions > kCountedInline))) {
    plan.counted = workspace.take(1, sizeof(double));
    problem.totals = true;
    Step count{.plan = DivisorPlan{}, .shape = {.threads = kDivisorThreads}};
    const std::int64_t at_once = args.sample_weight.data ? kDivisorThreads : kCountedAtOnce;
    const bool quick = problem.positions <= (args.sample_weight.data ? at_once : kCountedByOneBlock);
    problem.set_blocks(count, quick ? 1 : ceil_div(problem.positions, at_once), workspace);
    plan.steps.push_back(count);
  }
  plan.steps.push_back(*step);
  return plan;
}

}  // namespace fusedloss::cuda
