// From the plan of a cross entropy to launches, for one element type. This header is included once for each type, in a
// file of its own, so that they compile side by side.

#pragma once

#include "cross_entropy_columns.cuh"
#include "cross_entropy_rows.cuh"
#include "cross_entropy_tiles.cuh"
#include "cross_entropy_warps.cuh"
#include "workspace.h"

namespace fusedloss::cuda {

// The divisor of the mean, before anything else.
template <class Acc>
__global__ void __launch_bounds__(kDivisorThreads)
    cross_entropy_divisor(const __grid_constant__ CrossEntropyArgs args, const GridSums grid, const Total total) {
  const std::int64_t begin = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  Sums sums;
  sums.divisor = args.sample_weight.data
                     ? count_weights<Acc>(args, begin, step)
                     : count(args.target, args.shape, static_cast<const Acc*>(args.weight), begin, step);
  add_up(grid, total, blockIdx.x, sums);
}

// The kernel of a step, by what its plan is.
template <class T, class Plan>
auto kernel_of(const Step& step, const Plan&) {
  const auto variant = [&]<bool kGeneral, Pass kPass>() {
    if constexpr (std::is_same_v<Plan, TilePlan>) {
      constexpr int kOne = kGeneral ? 0 : 1, kFew = kGeneral ? 0 : kFewLanes;
      return step.variant == kOne ? cross_entropy_tiles<T, kGeneral, kPass, kOne>
                                  : cross_entropy_tiles<T, kGeneral, kPass, kFew>;
    } else if constexpr (std::is_same_v<Plan, WarpPlan>) {
      if constexpr (kGeneral) {
        return static_cast<void (*)(CrossEntropyArgs, WarpPlan, Run)>(nullptr);  // never planned
      } else {
        return step.variant == kMostWarpLogits  ? cross_entropy_warps<T, kPass, kMostWarpLogits, true>
               : step.variant == kFewWarpLogits ? cross_entropy_warps<T, kPass, kFewWarpLogits, true>
                                                : cross_entropy_warps<T, kPass, kFewWarpLogits, false>;
      }
    } else if constexpr (std::is_same_v<Plan, RowPlan>) {
      if constexpr (kPass == Pass::forward && !kGeneral) {
        if (step.answers) return cross_entropy_answers<T>;
      }
      constexpr bool kCluster = kPass == Pass::forward_with_gradient;  // no other pass has such a kernel
      return step.variant ? cross_entropy_rows<T, kGeneral, kPass, kCluster>
                          : cross_entropy_rows<T, kGeneral, kPass, false>;
    } else {
      constexpr int kNarrow = sizeof(T) < 4 && !kGeneral ? 2 : 1, kWide = kGeneral ? 1 : kPacketOf<T>;
      return step.variant == kWide     ? cross_entropy_columns<T, kGeneral, kPass, kWide>
             : step.variant == kNarrow ? cross_entropy_columns<T, kGeneral, kPass, kNarrow>
                                       : cross_entropy_columns<T, kGeneral, kPass, 1>;
    }
  };
  const auto of_pass = [&]<bool kGeneral>() {
    switch (step.pass) {
      case Pass::forward: return variant.template operator()<kGeneral, Pass::forward>();
      case Pass::forward_with_gradient: return variant.template operator()<kGeneral, Pass::forward_with_gradient>();
      default: return variant.template operator()<kGeneral, Pass::backward>();
    }
  };
  constexpr bool kOnlyGeneral = std::is_same_v<T, double>;
  return step.general ? of_pass.template operator()<true>() : of_pass.template operator()<kOnlyGeneral>();
}

template <class T>
auto kernel_of(const Step&, const DivisorPlan&) {
  return cross_entropy_divisor<Accumulate<T>>;
}

template <class T>
std::int64_t resident_blocks_of(const Step& step) {
  const void* kernel = std::visit([&](const auto& plan) { return address_of(kernel_of<T>(step, plan)); }, step.plan);
  return resident_blocks(kernel, step.shape);
}

template <class T>
void launch_cross_entropy(const CrossEntropyArgs& given, Pass pass, const Allocate& allocate, void* stream) {
  using Acc = Accumulate<T>;
  constexpr const char* kNames[] = {"cross_entropy_divisor", "cross_entropy_tiles", "cross_entropy_warps",
                                    "cross_entropy_rows", "cross_entropy_columns"};
  const CrossEntropyPlan plan = plan_cross_entropy(given, pass, current_device(), resident_blocks_of<T>);
  const Memory memory(plan.workspace, allocate, stream);
  double* const counted = memory.at<double>(plan.counted);
  CrossEntropyArgs args = given;
  if (!args.row_max) args.row_max = memory.at<Acc>(plan.row_max);
  if (!args.row_log_sum) args.row_log_sum = memory.at<Acc>(plan.row_log_sum);
  if (!args.total.divisor) args.total.divisor = memory.at<double>(plan.divisor);
  if (plan.reads_twice && args.total.reduction == Reduction::mean) args.grad_divisor = args.total.divisor;
  for (const Step& step : plan.steps) {
    const Run run{memory.grid(step.grid), counted};
    const Total divisor{.reduction = Reduction::mean, .divisor = counted};
    const char* const name = kNames[step.plan.index()];
    const auto start = [&]<class Plan>(Plan traversal) {
      const auto kernel = kernel_of<T>(step, traversal);
      if constexpr (std::is_same_v<Plan, RowPlan>) {
        static_assert(sizeof(PartStatistics<Acc, true, true>) == statistics_bytes(sizeof(T), true));
        static_assert(sizeof(PartStatistics<float, false, false>) == statistics_bytes(sizeof(float), false));
        traversal.parts = memory.at<char>(step.row_parts);
        traversal.tickets = memory.tickets(step.row_tickets);
      }
      if constexpr (std::is_same_v<Plan, DivisorPlan>) {
        launch(name, kernel, step.shape, stream, args, run.grid, divisor);
      } else {
        launch(name, kernel, step.shape, stream, args, traversal, run);
      }
    };
    std::visit(start, step.plan);
  }
}

}  // namespace fusedloss::cuda
