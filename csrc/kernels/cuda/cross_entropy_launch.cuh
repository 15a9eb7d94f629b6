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

// How many blocks of so many threads and so much shared memory a multiprocessor holds, if a thread has 64 registers.
inline std::int64_t resident_blocks(const Device& device, int threads, std::size_t shared_bytes) {
  constexpr int kThreads = 1024;
  constexpr std::size_t kReserved = 2048;  // by the system, and static
  const std::int64_t by_threads = kThreads / threads;
  const auto by_memory = static_cast<std::int64_t>(device.shared_per_multiprocessor / (shared_bytes + kReserved));
  return std::max<std::int64_t>(1, std::min(by_threads, by_memory));
}

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
      constexpr int kThreads = 256;
      const std::int64_t blocks =
          std::min<std::int64_t>(ceil_div(positions, 8 * kThreads), 4 * device_.multiprocessors);
      double* divisor = arena_.take<double>(1);
      const GridSums grid = grid_sums(arena_, blocks, stream_);
      start("cross_entropy_divisor", cross_entropy_divisor<Acc>, {.blocks = blocks, .threads = kThreads}, args_, grid,
            Total{.reduction = Reduction::mean, .divisor = divisor});
      run.divisor = divisor;
    }
    return run;
  }

  template <class... Parameters>
  void start(const char* name, void (*kernel)(Parameters...), const Launch& shape, const Parameters&... arguments) {
    if (!arena_.is_measured()) launch(name, kernel, shape, stream_, arguments...);
  }

  // The pass and whether entries need more than their logit become constants of the kernel here.
  template <class F>
  void with_variant(F body) {
    const auto with_pass = [&]<bool kGeneral>() {
      switch (pass_) {
        case Pass::forward: return body.template operator()<kGeneral, Pass::forward>();
        case Pass::forward_with_gradient: return body.template operator()<kGeneral, Pass::forward_with_gradient>();
        case Pass::backward: return body.template operator()<kGeneral, Pass::backward>();
      }
    };
    if constexpr (!kOnlyGeneral) {
      if (!is_general()) return with_pass.template operator()<false>();
    }
    with_pass.template operator()<true>();
  }

  // --- Traversals ---

  static std::size_t tile_bytes(const TilePlan& plan) { return 2 * plan.elements() * sizeof(T); }

  // Two tiles of a thousand float64 classes are more than some devices' blocks hold.
  bool fits_tiles() const {
    return args_.shape.classes <= kTileClasses && tile_bytes(plan_tiles<T>(args_)) <= device_.shared_per_block;
  }

  void tiles() {
    const TilePlan plan = plan_tiles<T>(args_);
    Launch shape{.threads = kTileThreads, .shared_bytes = tile_bytes(plan)};
    shape.blocks =
        std::min(plan.tiles, device_.multiprocessors * resident_blocks(device_, shape.threads, shape.shared_bytes));
    const Run run = prepare(shape.blocks);
    with_variant([&]<bool kGeneral, Pass kPass>() {
      if constexpr (!kGeneral) {  // the general code holds no entries in registers
        if (args_.shape.classes > 16 * plan.lanes) {
          return start("cross_entropy_tiles", cross_entropy_tiles<T, kGeneral, kPass, 32>, shape, args_, plan, run);
        }
      }
      start("cross_entropy_tiles", cross_entropy_tiles<T, kGeneral, kPass, 16>, shape, args_, plan, run);
    });
  }

  void columns() {
    const std::int64_t positions = args_.shape.positions(), classes = args_.shape.classes;
    ColumnPlan plan;
    plan.packets = !is_general() && kWidth > 1 && positions >= kWidth * kFewestPackets &&
                   args_.shape.inner % kWidth == 0 && has_packets(args_.logits) &&
                   (!args_.grad_logits.data || has_packets(args_.grad_logits));
    const int width = plan.packets ? kWidth : 1;
    plan.items = positions / width;
    Launch shape{.threads = kColumnThreads};
    const auto kept = [&] { return static_cast<std::size_t>(classes) * shape.threads * width * sizeof(T); };
    if (pass_ == Pass::forward_with_gradient) {
      const std::size_t share = std::min(device_.shared_per_block, device_.shared_per_multiprocessor / 2) - 4096;
      while (shape.threads > kWarp && kept() > share / 2) shape.threads /= 2;
      plan.keeps = kept() <= share;
      if (plan.keeps) shape.shared_bytes = kept();
      if (!plan.keeps) shape.threads = kColumnThreads;
    }
    const std::int64_t most = device_.multiprocessors * resident_blocks(device_, shape.threads, shape.shared_bytes);
    shape.blocks = std::max<std::int64_t>(1, std::min(ceil_div(plan.items, shape.threads), most));
    const Run run = prepare(shape.blocks);
    with_variant([&]<bool kGeneral, Pass kPass>() {
      if constexpr (kWidth > 1 && !kGeneral) {
        if (plan.packets) {
          return start("cross_entropy_columns", cross_entropy_columns<T, kGeneral, kPass, kWidth>, shape, args_, plan,
                       run);
        }
      }
      start("cross_entropy_columns", cross_entropy_columns<T, kGeneral, kPass, 1>, shape, args_, plan, run);
    });
  }

  // Fewer would leave most of the device idle.
  static constexpr std::int64_t kFewestPackets = 1024;

  static bool has_packets(const ClassTensor& tensor) {
    return tensor.inner_stride == 1 && tensor.class_stride % kWidth == 0 && tensor.outer_stride % kWidth == 0 &&
           is_aligned(static_cast<const T*>(tensor.data));
  }

  void rows() {
    RowPlan plan;
    Launch shape;
    const std::int64_t positions = args_.shape.positions();
    // An overhang at both ends costs a packet more.
    const std::int64_t packets = ceil_div(args_.shape.classes + kWidth - 1, kWidth) + 1;
    const std::int64_t row_bytes = packets * kPacketBytes;
    const std::int64_t most_slices = std::max<std::int64_t>(1, row_bytes / kSmallestSlice);
    if (pass_ == Pass::forward_with_gradient) {
      const auto share = static_cast<std::int64_t>(device_.shared_per_block) - 4096;
      const int most = device_.clusters && is_compiled_for_clusters() ? kMaxCluster : 1;
      const auto grows = [&](std::int64_t bytes) {
        return bytes > kPreferredShare ||
               (plan.slices * positions < device_.multiprocessors && bytes > 2 * kSmallestSlice);
      };
      while (plan.slices < most && grows(row_bytes / plan.slices)) plan.slices *= 2;
      if (ceil_div(packets, plan.slices) * kPacketBytes > share) return forward_then_backward();
      shape.cluster = plan.slices;
    } else if (positions < device_.multiprocessors && !(pass_ == Pass::backward && args_.has_probabilities)) {
      plan.slices = static_cast<int>(std::min(ceil_div(2 * device_.multiprocessors, positions), most_slices));
    }
    plan.slice_packets = ceil_div(packets, plan.slices);
    const std::int64_t slice_bytes = plan.slice_packets * kPacketBytes;
    for (const RowGeometry& geometry : kRowGeometry) {
      shape.threads = geometry.threads;
      if (slice_bytes <= geometry.bytes) break;
    }
    if (pass_ == Pass::forward_with_gradient) shape.shared_bytes = slice_bytes;

    const std::int64_t resident =
        device_.multiprocessors * resident_blocks(device_, shape.threads, shape.shared_bytes) / plan.slices;
    const bool meets = pass_ == Pass::forward && plan.slices > 1;
    // Rows whose slices meet through memory are all of them on their way at once: there are few.
    const std::int64_t at_once = meets ? positions : std::clamp<std::int64_t>(resident, 1, positions);
    shape.blocks = at_once * plan.slices;
    const Run run = prepare(at_once);
    if (meets) {
      plan.tickets = zero_tickets(arena_, positions, stream_);
      plan.parts = arena_.take<RowSums<Acc, true>>(positions * plan.slices);
    }
    with_variant([&]<bool kGeneral, Pass kPass>() {
      if constexpr (kPass == Pass::forward_with_gradient) {
        if (shape.cluster > 1) {
          return start("cross_entropy_rows", cross_entropy_rows<T, kGeneral, kPass, true>, shape, args_, plan, run);
        }
      }
      start("cross_entropy_rows", cross_entropy_rows<T, kGeneral, kPass, false>, shape, args_, plan, run);
    });
  }

  // Code of an older architecture that the driver has translated for this device knows no clusters.
  static bool is_compiled_for_clusters() {
    static const bool is = [] {
      cudaFuncAttributes attributes{};
      const auto kernel = cross_entropy_rows<T, true, Pass::forward_with_gradient, true>;
      check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
      return attributes.ptxVersion >= 90;
    }();
    return is;
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
