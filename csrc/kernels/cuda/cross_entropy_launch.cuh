// From the plan of a cross entropy to launches, for one element type. This header is included once for each type, in a
// file of its own, so that they compile side by side.

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

// --- The kernel of a step ---

// Calls kernel<kGeneral, kPass>(). Plans have the general kernels alone for float64.
template <class T, class F>
auto variant(const Step& step, F kernel) {
  const auto of_pass = [&]<bool kGeneral>() {
    switch (step.pass) {
      case Pass::forward: return kernel.template operator()<kGeneral, Pass::forward>();
      case Pass::forward_with_gradient: return kernel.template operator()<kGeneral, Pass::forward_with_gradient>();
      default: return kernel.template operator()<kGeneral, Pass::backward>();
    }
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (!step.general) return of_pass.template operator()<false>();
  }
  return of_pass.template operator()<true>();
}

template <class T>
auto kernel_of(const Step&, const DivisorPlan&) {
  return cross_entropy_divisor<Accumulate<T>>;
}

template <class T>
auto kernel_of(const Step& step, const TilePlan&) {
  return variant<T>(step, [&]<bool kGeneral, Pass kPass>() {
    constexpr int kMost = kGeneral ? kFewPerLane : kMostPerLane;
    return step.variant == kMost ? cross_entropy_tiles<T, kGeneral, kPass, kMost>
                                 : cross_entropy_tiles<T, kGeneral, kPass, kFewPerLane>;
  });
}

template <class T>
auto kernel_of(const Step& step, const RowPlan&) {
  return variant<T>(step, [&]<bool kGeneral, Pass kPass>() {
    constexpr bool kCluster = kPass == Pass::forward_with_gradient;  // no other pass has such a kernel
    return step.variant ? cross_entropy_rows<T, kGeneral, kPass, kCluster>
                        : cross_entropy_rows<T, kGeneral, kPass, false>;
  });
}

template <class T>
auto kernel_of(const Step& step, const ColumnPlan&) {
  return variant<T>(step, [&]<bool kGeneral, Pass kPass>() {
    constexpr int kWidth = kGeneral ? 1 : kPacketOf<T>;
    return step.variant == kWidth ? cross_entropy_columns<T, kGeneral, kPass, kWidth>
                                  : cross_entropy_columns<T, kGeneral, kPass, 1>;
  });
}

template <class T>
std::int64_t resident_blocks_of(const Step& step) {
  const void* kernel = std::visit([&](const auto& plan) { return address_of(kernel_of<T>(step, plan)); }, step.plan);
  return resident_blocks(kernel, step.shape);
}

// --- Launches ---

template <class T>
void launch_cross_entropy(const CrossEntropyArgs& given, Pass pass, const Allocate& allocate, void* stream) {
  using Acc = Accumulate<T>;
  static_assert(sizeof(math::RowStatistics<Acc, true>) == (sizeof(Acc) == 8 ? 32 : 24));
  const CrossEntropyPlan plan = plan_cross_entropy(given, pass, current_device(), resident_blocks_of<T>);
  const Memory memory(plan.workspace, allocate, stream);
  double* const divisor = memory.at<double>(plan.divisor);
  CrossEntropyArgs args = given;
  if (plan.reads_twice) {
    if (!args.row_max) args.row_max = memory.at<Acc>(plan.row_max);
    if (!args.row_log_sum) args.row_log_sum = memory.at<Acc>(plan.row_log_sum);
    if (!args.total.divisor) args.total.divisor = divisor;
    if (args.total.reduction == Reduction::mean) args.flow.divisor = args.total.divisor;
  }
  for (const Step& step : plan.steps) {
    const Run run{memory.grid(step.grid), divisor};
    const auto start = [&](const char* name, const auto& traversal) {
      launch(name, kernel_of<T>(step, traversal), step.shape, stream, args, traversal, run);
    };
    if (const auto* counted = std::get_if<DivisorPlan>(&step.plan)) {
      launch("cross_entropy_divisor", kernel_of<T>(step, *counted), step.shape, stream, args, run.grid,
             Total{.reduction = Reduction::mean, .divisor = divisor});
    } else if (const auto* tiles = std::get_if<TilePlan>(&step.plan)) {
      start("cross_entropy_tiles", *tiles);
    } else if (const auto* columns = std::get_if<ColumnPlan>(&step.plan)) {
      start("cross_entropy_columns", *columns);
    } else {
      RowPlan rows = std::get<RowPlan>(step.plan);
      rows.parts = memory.at<math::RowStatistics<Acc, true>>(step.row_parts);
      rows.tickets = memory.tickets(step.row_tickets);
      start("cross_entropy_rows", rows);
    }
  }
}

}  // namespace fusedloss::cuda
