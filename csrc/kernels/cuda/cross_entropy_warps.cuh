// Cross entropy over some hundreds of classes that lie side by side: a warp for a row, which it holds in registers.
//
// A lane has up to kPerLane logits, in packets that are all asked for before the first is used; the elements before the
// row's first aligned packet and behind its last one are single, each with a lane of its own. The warp agrees on the
// row's maximum, then on the sum of the exponentials, which become the gradient where forward writes it too. The next
// row's target is on its way meanwhile. Rows are finished 32 at a time, one by each lane.

#pragma once

#include "cross_entropy.cuh"

namespace fusedloss::cuda {

template <class T, Pass kPass, int kPerLane>
class Warps : CrossEntropy<T, false, kPass> {
  using Base = CrossEntropy<T, false, kPass>;
  using Base::args_;
  using typename Base::Acc;
  using typename Base::Gradient;
  using typename Base::Statistics;
  using Row = Span<const T, int>;
  static constexpr int kWidth = kPacketOf<T>, kPackets = kPerLane / kWidth;

 public:
  using Base::Base;

  __device__ __forceinline__ void process(const Run& run) {
    const int warps = blockDim.x / kWarp;
    const std::int64_t positions = args_.shape.positions(), step = std::int64_t(gridDim.x) * warps;
    std::int64_t position = std::int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
    std::int64_t index = position < positions ? this->index_at(position) : 0;
    for (; position < positions; position += step) {
      const Target<Acc> target = this->target_of(index);
      if (position + step < positions) index = this->index_at(position + step);
      row(position, target);
    }
    if constexpr (kPass != Pass::backward) {
      this->finish_waiting(sums_);
      add_up(run.grid, args_.total, blockIdx.x, sums_);
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarp; }
  __device__ __forceinline__ static T nothing() { return convert<T>(-math::kInfinity<Acc>); }

  __device__ __forceinline__ void row(std::int64_t position, const Target<Acc>& target) {
    const T* logits = static_cast<const T*>(args_.logits.data) + offset_of(args_.shape, args_.logits, position);
    const Row row(logits, this->classes());

    // Load. Of a row that is skipped nothing, and its exponentials are zeros.
    const int wanted = target.skip ? 0 : row.packets;
    Packet<T> packets[kPackets];
#pragma unroll
    for (int u = 0; u < kPackets; ++u) {
      packets[u] = Packet<T>::filled(nothing());
      if (lane() + u * kWarp < wanted) packets[u] = row.load(lane() + u * kWarp);
    }
    const bool has_single = lane() < row.singles;
    T single = nothing(), target_entry = nothing();
    if (has_single && !target.skip) single = logits[row.single(lane())];
    if (target.index >= 0) target_entry = logits[target.index];

    // Reduce.
    Statistics statistics;
    Gradient gradient{};
    if constexpr (kPass == Pass::backward) {
      if (!target.skip) gradient = this->saved_gradient(position, target, Acc(0));
      statistics.max = gradient.shift;
    } else {
      Packet<T> largest = packets[0];
#pragma unroll
      for (int u = 1; u < kPackets; ++u) largest = largest.max(packets[u]);
      statistics.max = group_max(math::max_ignoring_nan(largest.max(), convert<Acc>(single)), kWarp);
    }
    const Acc shift = math::finite_shift(statistics.max);
    Acc e[kPerLane];
#pragma unroll
    for (int u = 0; u < kPackets; ++u) {
      Acc x[kWidth];
      packets[u].unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        e[u * kWidth + i] = Base::exp(x[i] - shift);
        statistics.sum += e[u * kWidth + i];
      }
    }
    const Acc single_e = Base::exp(convert<Acc>(single) - shift);
    if constexpr (kPass != Pass::backward) {
      statistics.sum = warp_sum(statistics.sum + single_e);
      const Acc target_logit = target.index < 0 ? Acc(0) : convert<Acc>(target_entry);
      this->finish_later(position, target, statistics, target_logit, lane(), kWarp, sums_);
    }

    // Store.
    if constexpr (kPass == Pass::forward) return;
    if constexpr (kPass == Pass::forward_with_gradient) {
      if (!target.skip) gradient = this->gradient(position, target, statistics);
    }
    T* grad = static_cast<T*>(args_.grad_logits.data) + offset_of(args_.shape, args_.grad_logits, position);
    const bool aligned = misalignment(grad) == misalignment(logits);
    __syncwarp();  // all lanes have read the target's logit, whose place the gradient may take
#pragma unroll
    for (int u = 0; u < kPackets; ++u) {
      const int p = lane() + u * kWarp;
      if (p >= row.packets) break;
      Acc x[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = math::logit_grad(e[u * kWidth + i], gradient.factor, Acc(0));
      store_packet(grad + row.first(p), Packet<T>::pack(x), aligned);
    }
    if (has_single) grad[row.single(lane())] = convert<T>(math::logit_grad(single_e, gradient.factor, Acc(0)));
    // The target's entry once more, with its mass: by the lane that has just written it.
    if (target.index >= 0 && lane() == row.owner(target.index, kWarp)) {
      const Acc target_e = Base::exp(convert<Acc>(target_entry) - shift);
      grad[target.index] = convert<T>(math::logit_grad(target_e, gradient.factor, gradient.on_target));
    }
  }

  Sums sums_;
};

template <class T, Pass kPass, int kPerLane>
__global__ void __launch_bounds__(kWarpRowThreads, kPerLane * sizeof(T) > 128 ? 3 : kPerLane * sizeof(T) > 64 ? 4 : 5)
    cross_entropy_warps(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ WarpPlan plan,
                        const __grid_constant__ Run run) {
  Warps<T, kPass, kPerLane>(args, run).process(run);
}

}  // namespace fusedloss::cuda
