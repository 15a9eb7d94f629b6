#include "plan.h"

#include <optional>

namespace fusedloss::cuda {
namespace {

// Up to this many positions every block counts the mean's divisor for itself: a few microseconds, less than another
// launch. Beyond, a launch of its own counts them.
constexpr std::int64_t kCountedInline = 4096;
constexpr int kDivisorThreads = 256;
constexpr std::int64_t kCountedByThread = 8;  // positions, where the device holds so many threads

// Lanes of a row, by its number of classes: the first entry whose limit is not below it.
struct TileGeometry {
  int classes;
  int lanes;
};
constexpr TileGeometry kTileGeometry[] = {{16, 1}, {32, 2}, {64, 4}, {128, 8}, {256, 16}, {kTileClasses, 32}};
constexpr std::size_t kLongRow = 512;  // bytes, from which on it pays to look at targets before copying
constexpr int kBankBytes = 4;          // neighbours are in neighbouring banks

// Threads of a block, by the bytes of a row's slice: the first entry whose limit is not below them.
struct RowGeometry {
  std::int64_t bytes;
  int threads;
};
constexpr RowGeometry kRowGeometry[] = {
    {8 * 1024, 128}, {32 * 1024, 256}, {96 * 1024, 512}, {std::int64_t(1) << 62, kRowThreads}};

// Bytes: what is worth a block of its own, and what leaves room for a second and third block beside it, so that one
// reads while another writes.
constexpr std::int64_t kSmallestSlice = 8 * 1024;
constexpr std::int64_t kPreferredShare = 68 * 1024;

// Of positions, for each multiprocessor: fewer would leave most of the device idle.
constexpr std::int64_t kFewestPackets = 8;

int bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Elements of `bytes` each that a tensor starts behind the start of its first packet.
int overhang(const ClassTensor& tensor, int bytes) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(tensor.data) % kPacketBytes / bytes);
}

struct Problem {
  const CrossEntropyArgs& args;
  const Pass pass;
  const bool totals;  // a total over the positions is wanted
  const Device& device;
  const ResidentBlocks resident_blocks;

  std::int64_t classes() const { return args.shape.classes; }
  std::int64_t positions() const { return args.shape.positions(); }
  int logit_bytes() const { return bytes_of(args.logits.dtype); }
  int width() const { return kPacketBytes / logit_bytes(); }

  // float64 has the general kernels alone: half the code, for a type that is for checking.
  bool general() const {
    return args.logits.dtype == Dtype::float64 || args.has_probabilities || args.label_smoothing != 0 ||
           args.logit_softcap != 0;
  }

  // A block of the grid takes turns at the work, and leaves its part of the total.
  void set_blocks(Step& step, std::int64_t units, Workspace& workspace) const {
    step.shape.blocks = blocks_for(units, resident_blocks(step));
    if (totals) step.grid = workspace.take_grid(step.shape.blocks);
  }
};

// --- Tiles ---

// None where two tiles are more than a block holds, as a thousand float64 classes are on some devices.
std::optional<Step> plan_tiles(const Problem& problem, Workspace& workspace) {
  if (problem.classes() > kTileClasses) return std::nullopt;
  const CrossEntropyArgs& args = problem.args;
  const int classes = static_cast<int>(problem.classes()), logit_bytes = problem.logit_bytes();
  TilePlan plan;
  plan.lanes = std::ranges::find_if(kTileGeometry, [&](const auto& entry) { return classes <= entry.classes; })->lanes;
  plan.rows = kTileThreads / plan.lanes;
  plan.tiles = ceil_div(problem.positions(), plan.rows);
  plan.classes = Division::by(classes);
  const auto follows = [&](const ClassTensor& tensor) {
    return tensor.class_stride == 1 && args.shape.outer == 1 && tensor.inner_stride == classes;
  };
  plan.stream = follows(args.logits);
  // A tile holds a multiple of 16 bytes (of whole rows of kTileThreads / lanes), so that all tiles start alike.
  plan.start = plan.stream ? overhang(args.logits, logit_bytes) : 0;
  plan.grad_stream = plan.stream && follows(args.grad_logits) && overhang(args.grad_logits, logit_bytes) == plan.start;
  plan.pitch = classes;
  const std::size_t row_bytes = std::size_t(classes) * logit_bytes;
  // Rows of a multiple of 16 bytes would start in few of the 32 banks, and lanes of different rows wait for one
  // another.
  if (logit_bytes <= kBankBytes && plan.start == 0 && row_bytes % kPacketBytes == 0 && plan.lanes < kWarp) {
    plan.pitch += kBankBytes / logit_bytes;
  }
  plan.skips = row_bytes >= kLongRow;

  Step step{.plan = plan, .pass = problem.pass, .general = problem.general()};
  // The general code holds no entries in registers.
  step.variant = !step.general && classes > kFewPerLane * plan.lanes ? kMostPerLane : kFewPerLane;
  step.shape = {.threads = kTileThreads, .shared_bytes = 2 * plan.elements() * logit_bytes};
  if (step.shape.shared_bytes > problem.device.dynamic_shared) return std::nullopt;
  problem.set_blocks(step, plan.tiles, workspace);
  return step;
}

// --- Rows ---

// How many slices a row has. A gradient in forward wants the slices of a cluster's blocks small enough for others to
// fit beside them, and as few as that takes; other passes cut rows only where there are fewer than multiprocessors.
int preferred_slices(const Problem& problem, std::int64_t row_bytes) {
  const std::int64_t positions = problem.positions(), multiprocessors = problem.device.multiprocessors;
  if (problem.pass == Pass::forward_with_gradient) {
    int slices = 1;
    const auto is_large = [&](std::int64_t bytes) {
      return bytes > kPreferredShare || (slices * positions < multiprocessors && bytes > 2 * kSmallestSlice);
    };
    while (slices < problem.device.largest_cluster && is_large(row_bytes / slices)) slices *= 2;
    return slices;
  }
  // A slice would need the mass of the whole row.
  const bool needs_mass = problem.pass == Pass::backward && problem.args.has_probabilities;
  if (positions >= multiprocessors || needs_mass) return 1;
  const std::int64_t most = std::max<std::int64_t>(1, row_bytes / kSmallestSlice);
  return static_cast<int>(std::min(ceil_div(2 * multiprocessors, positions), most));
}

// None where forward writes a gradient and shared memory does not hold the rows.
std::optional<Step> plan_rows(const Problem& problem, Workspace& workspace) {
  const std::int64_t positions = problem.positions(), width = problem.width();
  const bool keeps = problem.pass == Pass::forward_with_gradient;
  // An overhang at both ends costs a packet more.
  const std::int64_t packets = ceil_div(problem.classes() + width - 1, width) + 1;

  RowPlan plan{.slices = preferred_slices(problem, packets * kPacketBytes)};
  Step step{.pass = problem.pass, .general = problem.general()};
  std::int64_t resident = 0;
  for (;; plan.slices /= 2) {
    plan.slice_packets = ceil_div(packets, plan.slices);
    const std::int64_t bytes = plan.slice_packets * kPacketBytes;
    step.shape.threads =
        std::ranges::find_if(kRowGeometry, [&](const auto& entry) { return bytes <= entry.bytes; })->threads;
    if (keeps) {
      step.shape.shared_bytes = bytes;
      step.shape.cluster = plan.slices;
      if (step.shape.shared_bytes > problem.device.dynamic_shared) return std::nullopt;
    }
    step.variant = step.shape.cluster > 1;
    step.plan = plan;
    resident = problem.resident_blocks(step);
    // A part of a device may have no place for so many blocks side by side.
    if (step.shape.cluster == 1 || resident > 0) break;
  }

  // There are few rows whose slices meet through memory, and all of them are on their way at once.
  const bool meets = problem.pass == Pass::forward && plan.slices > 1;
  const std::int64_t at_once = meets ? positions : blocks_for(positions, resident / plan.slices);
  step.shape.blocks = at_once * plan.slices;
  if (problem.totals) step.grid = workspace.take_grid(at_once);
  if (meets) {
    step.row_tickets = workspace.take(positions, Workspace::kTicketBytes);
    step.row_parts = workspace.take(positions * plan.slices, Workspace::row_sums_bytes(problem.args.logits.dtype));
  }
  return step;
}

// --- Columns ---

Step plan_columns(const Problem& problem, Workspace& workspace) {
  const CrossEntropyArgs& args = problem.args;
  const Device& device = problem.device;
  const std::int64_t positions = problem.positions(), most = problem.width();
  const auto has_packets = [&](const ClassTensor& tensor) {
    return tensor.inner_stride == 1 && tensor.class_stride % most == 0 && tensor.outer_stride % most == 0 &&
           reinterpret_cast<std::uintptr_t>(tensor.data) % kPacketBytes == 0;
  };
  Step step{.pass = problem.pass, .general = problem.general(), .shape = {.threads = kColumnThreads}};
  ColumnPlan plan;
  plan.packets = !step.general && most > 1 && positions >= most * kFewestPackets * device.multiprocessors &&
                 args.shape.inner % most == 0 && has_packets(args.logits) &&
                 (!args.grad_logits.data || has_packets(args.grad_logits));
  step.variant = plan.packets ? static_cast<int>(most) : 1;
  plan.items = positions / step.variant;
  if (problem.pass == Pass::forward_with_gradient) {
    const auto kept = [&] {
      return static_cast<std::size_t>(problem.classes()) * step.shape.threads * step.variant * problem.logit_bytes();
    };
    // Two blocks fit into a multiprocessor, and four where they may have fewer threads.
    const std::size_t share =
        std::min(device.dynamic_shared, device.shared_per_multiprocessor / 2 - kStaticSharedBytes);
    while (step.shape.threads > kWarp && kept() > share / 2) step.shape.threads /= 2;
    plan.keeps = kept() <= share;
    if (plan.keeps) {
      step.shape.shared_bytes = kept();
    } else {
      step.shape.threads = kColumnThreads;
    }
  }
  step.plan = plan;
  problem.set_blocks(step, ceil_div(plan.items, step.shape.threads), workspace);
  return step;
}

// --- The divisor ---

Step plan_divisor(const Problem& problem, Workspace& workspace) {
  Step step{.plan = DivisorPlan{}, .shape = {.threads = kDivisorThreads}};
  problem.set_blocks(step, ceil_div(problem.positions(), kCountedByThread * kDivisorThreads), workspace);
  return step;
}

}  // namespace

CrossEntropyPlan plan_cross_entropy(const CrossEntropyArgs& args, Pass pass, const Device& device,
                                    ResidentBlocks resident_blocks) {
  const bool totals = pass != Pass::backward && (args.total.loss || args.total.divisor);
  const Problem problem{args, pass, totals, device, resident_blocks};
  const std::int64_t positions = problem.positions();
  CrossEntropyPlan plan;
  if (positions == 0 && !totals) return plan;

  Workspace& workspace = plan.workspace;
  const auto side_by_side = [](const ClassTensor& tensor) { return tensor.class_stride == 1; };
  std::optional<Step> step;
  if (positions == 0 || problem.classes() == 0 || !side_by_side(args.logits) ||
      (args.grad_logits.data && !side_by_side(args.grad_logits))) {
    step = plan_columns(problem, workspace);
  } else {
    step = plan_tiles(problem, workspace);
    if (!step) step = plan_rows(problem, workspace);
  }
  if (step) {
    const bool needs_divisor = pass == Pass::forward_with_gradient && args.total.reduction == Reduction::mean;
    if (needs_divisor && !args.has_probabilities && positions > kCountedInline) {
      plan.divisor = workspace.take(1, sizeof(double));
      plan.steps.push_back(plan_divisor({args, pass, true, device, resident_blocks}, workspace));
    }
    plan.steps.push_back(*step);
    return plan;
  }

  // Statistics and divisor go through the workspace.
  plan.reads_twice = true;
  const std::size_t accumulate_bytes = args.logits.dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  if (!args.row_max) plan.row_max = workspace.take(positions, accumulate_bytes);
  if (!args.row_log_sum) plan.row_log_sum = workspace.take(positions, accumulate_bytes);
  if (!args.total.divisor) plan.divisor = workspace.take(1, sizeof(double));
  plan.steps.push_back(*plan_rows({args, Pass::forward, true, device, resident_blocks}, workspace));
  plan.steps.push_back(*plan_rows({args, Pass::backward, false, device, resident_blocks}, workspace));
  return plan;
}

}  // namespace fusedloss::cuda
