// From the arguments of cross entropy to launches, for one element type: which traversal, how many blocks, what
// workspace. This header is included once for each type, in a file of its own, so that they compile side by side.

#pragma once

#include "cross_entropy_columns.cuh"
#include "cross_entropy_rows.cuh"
#include "cross_entropy_tiles.cuh"
#include "workspace.h"

namespace fusedloss::cuda {

// The divisor of the mean, before anything else.
template <class Acc>
__global__ void __launch_bounds__(256)
    cross_entropy_divisor(const __grid_constant__ CrossEntropyArgs args, const GridSums grid, const Total total) {
  const std::int64_t begin = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  Sums sums;
  sums.divisor = count(args.target, args.shape, static_cast<const Acc*>(args.weight), begin, step);
  finish(grid, total, blockIdx.x, sums);
}

// A traversal's kernels differ in what is compiled into them, not in what they are called with.
template <class Plan>
using CrossEntropyKernel = void (*)(CrossEntropyArgs, Plan, Run);

template <class T>
class CrossEntropyLauncher {
  using Acc = Accumulate<T>;
  static constexpr int kWidth = kPacketOf<T>;

 public:
  CrossEntropyLauncher(const CrossEntropyArgs& args, Pass pass, Arena& arena, void* stream)
      : args_(args), pass_(pass), arena_(arena), stream_(stream), device_(current_device()) {}

  void run() {
    const bool empty = args_.shape.positions() == 0;
    if (empty && !totals()) return;
    const ClassTensor& logits = args_.logits;
    const bool rows = args_.shape.classes > 0 && logits.class_stride == 1 &&
                      (!args_.grad_logits.data || args_.grad_logits.class_stride == 1);
    if (empty || !rows) {
      columns();
    } else if (fits_tiles()) {
      tiles();
    } else {
      this->rows();
    }
  }

 private:
  bool totals() const { return pass_ != Pass::backward && (args_.total.loss || args_.total.divisor); }
  // float64 has the general kernels alone: half the code, for a type that is for checking.
  static constexpr bool kOnlyGeneral = std::is_same_v<T, double>;
  bool is_general() const {
    return kOnlyGeneral || args_.has_probabilities || args_.label_smoothing != 0 || args_.logit_softcap != 0;
  }

  // --- Reductions over the grid, and the divisor ---

  // units: of work, each of which leaves a part of the total.
  Run prepare(std::int64_t units) {
    Run run;
    if (totals()) run.grid = grid_sums(arena_, units, stream_);
    const std::int64_t positions = args_.shape.positions();
    const bool needs_divisor = pass_ == Pass::forward_with_gradient && args_.total.reduction == Reduction::mean;
    if (needs_divisor && !args_.has_probabilities && positions > kCountedInline) {
      Launch shape{.threads = 256};
      shape.blocks = blocks_for(ceil_div(positions, 8 * shape.threads), address_of(cross_entropy_divisor<Acc>), shape);
      double* divisor = arena_.take<double>(1);
      const GridSums grid = grid_sums(arena_, shape.blocks, stream_);
      start(arena_, stream_, "cross_entropy_divisor", cross_entropy_divisor<Acc>, shape, 0, args_, grid,
            Total{.reduction = Reduction::mean, .divisor = divisor});
      run.divisor = divisor;
    }
    return run;
  }

  // The kernel for this pass, and for whether entries need more than their logit: kernel<kGeneral, kPass>().
  template <class Plan, class F>
  CrossEntropyKernel<Plan> variant(F kernel) const {
    const auto of_pass = [&]<bool kGeneral>() -> CrossEntropyKernel<Plan> {
      switch (pass_) {
        case Pass::forward: return kernel.template operator()<kGeneral, Pass::forward>();
        case Pass::forward_with_gradient: return kernel.template operator()<kGeneral, Pass::forward_with_gradient>();
        default: return kernel.template operator()<kGeneral, Pass::backward>();
      }
    };
    if constexpr (!kOnlyGeneral) {
      if (!is_general()) return of_pass.template operator()<false>();
    }
    return of_pass.template operator()<true>();
  }

  // --- Traversals ---

  static std::size_t tile_bytes(const TilePlan& plan) { return 2 * plan.elements() * sizeof(T); }

  // Two tiles of a thousand float64 classes are more than some devices' blocks hold.
  bool fits_tiles() const {
    return args_.shape.classes <= kTileClasses && tile_bytes(plan_tiles<T>(args_)) <= device_.dynamic_shared;
  }

  void tiles() {
    const TilePlan plan = plan_tiles<T>(args_);
    const auto kernel = variant<TilePlan>([&]<bool kGeneral, Pass kPass>() {
      constexpr int kMost = kGeneral ? 16 : 32;  // the general code holds no entries in registers
      return args_.shape.classes > 16 * plan.lanes ? cross_entropy_tiles<T, kGeneral, kPass, kMost>
                                                   : cross_entropy_tiles<T, kGeneral, kPass, 16>;
    });
    Launch shape{.threads = kTileThreads, .shared_bytes = tile_bytes(plan)};
    shape.blocks = blocks_for(plan.tiles, address_of(kernel), shape);
    const Run run = prepare(shape.blocks);
    start(arena_, stream_, "cross_entropy_tiles", kernel, shape, 2 * plan.lanes + plan.skips, args_, plan, run);
  }

  void columns() {
    const std::int64_t positions = args_.shape.positions(), classes = args_.shape.classes;
    ColumnPlan plan;
    plan.packets = !is_general() && kWidth > 1 && positions >= kWidth * kFewestPackets * device_.multiprocessors &&
                   args_.shape.inner % kWidth == 0 && has_packets(args_.logits) &&
                   (!args_.grad_logits.data || has_packets(args_.grad_logits));
    const int width = plan.packets ? kWidth : 1;
    plan.items = positions / width;
    Launch shape{.threads = kColumnThreads};
    const auto kept = [&] { return static_cast<std::size_t>(classes) * shape.threads * width * sizeof(T); };
    if (pass_ == Pass::forward_with_gradient) {
      const std::size_t share =
          std::min(device_.dynamic_shared, device_.shared_per_multiprocessor / 2 - kStaticSharedBytes);
      while (shape.threads > kWarp && kept() > share / 2) shape.threads /= 2;
      plan.keeps = kept() <= share;
      if (plan.keeps) shape.shared_bytes = kept();
      if (!plan.keeps) shape.threads = kColumnThreads;
    }
    const auto kernel = variant<ColumnPlan>([&]<bool kGeneral, Pass kPass>() {
      constexpr int kPacket = kGeneral ? 1 : kWidth;
      return plan.packets ? cross_entropy_columns<T, kGeneral, kPass, kPacket>
                          : cross_entropy_columns<T, kGeneral, kPass, 1>;
    });
    shape.blocks = blocks_for(ceil_div(plan.items, shape.threads), address_of(kernel), shape);
    const Run run = prepare(shape.blocks);
    start(arena_, stream_, "cross_entropy_columns", kernel, shape, plan.keeps, args_, plan, run);
  }

  // For each multiprocessor: fewer would leave most of the device idle.
  static constexpr std::int64_t kFewestPackets = 8;

  static bool has_packets(const ClassTensor& tensor) {
    return tensor.inner_stride == 1 && tensor.class_stride % kWidth == 0 && tensor.outer_stride % kWidth == 0 &&
           is_aligned(static_cast<const T*>(tensor.data));
  }

  CrossEntropyKernel<RowPlan> row_kernel(bool cluster) const {
    return variant<RowPlan>([&]<bool kGeneral, Pass kPass>() {
      constexpr bool kCluster = kPass == Pass::forward_with_gradient;  // no other pass has such a kernel
      return cluster ? cross_entropy_rows<T, kGeneral, kPass, kCluster> : cross_entropy_rows<T, kGeneral, kPass, false>;
    });
  }

  // How many slices a row has. A gradient in forward wants the slices of a cluster's blocks small enough for others to
  // fit beside them, and as few as that takes; other passes cut rows only where there are fewer than multiprocessors.
  int preferred_slices(std::int64_t row_bytes) const {
    const std::int64_t positions = args_.shape.positions();
    int slices = 1;
    if (pass_ == Pass::forward_with_gradient) {
      const bool clusters = device_.largest_cluster > 1 && is_compiled_for_clusters(address_of(row_kernel(true)));
      const auto is_large = [&](std::int64_t bytes) {
        return bytes > kPreferredShare || (slices * positions < device_.multiprocessors && bytes > 2 * kSmallestSlice);
      };
      while (clusters && slices < kLargestCluster && is_large(row_bytes / slices)) slices *= 2;
    } else if (positions < device_.multiprocessors && !(pass_ == Pass::backward && args_.has_probabilities)) {
      const std::int64_t most = std::max<std::int64_t>(1, row_bytes / kSmallestSlice);
      slices = static_cast<int>(std::min(ceil_div(2 * device_.multiprocessors, positions), most));
    }
    return slices;
  }

  void rows() {
    const std::int64_t positions = args_.shape.positions();
    const bool keeps = pass_ == Pass::forward_with_gradient;
    // An overhang at both ends costs a packet more.
    const std::int64_t packets = ceil_div(args_.shape.classes + kWidth - 1, kWidth) + 1;

    RowPlan plan{.slices = preferred_slices(packets * kPacketBytes)};
    CrossEntropyKernel<RowPlan> kernel;
    Launch shape;
    for (;; plan.slices /= 2) {
      plan.slice_packets = ceil_div(packets, plan.slices);
      const std::int64_t slice_bytes = plan.slice_packets * kPacketBytes;
      for (const RowGeometry& geometry : kRowGeometry) {
        shape.threads = geometry.threads;
        if (slice_bytes <= geometry.bytes) break;
      }
      if (keeps) {
        if (slice_bytes > static_cast<std::int64_t>(device_.dynamic_shared)) return forward_then_backward();
        shape.shared_bytes = slice_bytes;
        shape.cluster = plan.slices;
      }
      kernel = row_kernel(shape.cluster > 1);
      // A part of a device may have no place for so many blocks side by side.
      if (shape.cluster == 1 || resident_blocks(address_of(kernel), shape) > 0) break;
    }

    const bool meets = pass_ == Pass::forward && plan.slices > 1;
    // There are few rows whose slices meet through memory, and all of them are on their way at once.
    const std::int64_t at_once =
        meets ? positions
              : std::clamp<std::int64_t>(resident_blocks(address_of(kernel), shape) / plan.slices, 1, positions);
    shape.blocks = at_once * plan.slices;
    const Run run = prepare(at_once);
    if (meets) {
      plan.tickets = zero_tickets(arena_, positions, stream_);
      plan.parts = arena_.take<math::RowStatistics<Acc, true>>(positions * plan.slices);
    }
    // Of slices that meet through memory a warp adds up 32 at a time.
    const std::int64_t way = keeps ? plan.slices : (plan.slices > 1) + (plan.slices > kWarp);
    start(arena_, stream_, "cross_entropy_rows", kernel, shape, way, args_, plan, run);
  }

  // Rows that no shared memory holds are read twice. Statistics and divisor go through the workspace.
  void forward_then_backward() {
    const std::int64_t positions = args_.shape.positions();
    CrossEntropyArgs args = args_;
    if (!args.row_max) args.row_max = arena_.take<Acc>(positions);
    if (!args.row_log_sum) args.row_log_sum = arena_.take<Acc>(positions);
    if (!args.total.divisor) args.total.divisor = arena_.take<double>(1);
    if (args.total.reduction == Reduction::mean) args.flow.divisor = args.total.divisor;
    CrossEntropyArgs forward = args;
    forward.grad_logits.data = nullptr;
    for (const auto& [pass, with] : {std::pair{Pass::forward, forward}, std::pair{Pass::backward, args}}) {
      CrossEntropyLauncher(with, pass, arena_, stream_).run();
    }
  }

  // Bytes: what is worth a block of its own, and what leaves room for a second and third block beside it, so that one
  // reads while another writes.
  static constexpr std::int64_t kSmallestSlice = 8 * 1024;
  static constexpr std::int64_t kPreferredShare = 68 * 1024;

  const CrossEntropyArgs& args_;
  const Pass pass_;
  Arena& arena_;
  void* const stream_;
  const Device& device_;
};

template <class T>
void launch_cross_entropy(const CrossEntropyArgs& args, Pass pass, Arena& arena, void* stream) {
  CrossEntropyLauncher<T>(args, pass, arena, stream).run();
}

}  // namespace fusedloss::cuda
