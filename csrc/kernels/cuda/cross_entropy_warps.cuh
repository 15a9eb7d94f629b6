// Cross entropy over some hundreds of classes that lie side by side: a warp for a row, or a part of one, which holds
// the row in registers.
//
// A lane has up to kPerLane logits, in packets that are all asked for before the first is used; the elements before the
// row's first aligned packet and behind its last one are single. The lanes of a row agree on its maximum, then on the
// sum of its exponentials, which become the gradient where forward writes it too. The next row's target is on its way
// meanwhile. Rows are finished several at a time, one by each lane.

#pragma once

#include "cross_entropy.cuh"

namespace fusedloss::cuda {

// What a lane holds of a row in registers, and how many blocks of a multiprocessor have so many.
template <class T, int kPerLane>
inline constexpr int kWarpBlocks = kPerLane * sizeof(T) > 128  ? 3
                                   : kPerLane * sizeof(T) > 64 ? 4
                                                               : 5;

// kWhole: a warp has one row; else 32 / plan.lanes of them.
template <class T, Pass kPass, int kPerLane, bool kWhole>
class Warps : CrossEntropy<T, false, kPass> {
  using Base = CrossEntropy<T, false, kPass>;
  using Base::args_;
  using typename Base::Acc;
  using typename Base::Gradient;
  using typename Base::Statistics;
  static constexpr int kWidth = kPacketOf<T>, kPackets = kPerLane / kWidth;
  static constexpr int kSingles = ceil_div(2 * (kWidth - 1), kWhole ? kWarp : kFewestWarpLanes);  // of a lane

 public:
  __device__ __forceinline__ Warps(const CrossEntropyArgs& args, const WarpPlan& plan, const Run& run)
      : Base(args, run), plan_(plan), lanes_(kWhole ? kWarp : plan.lanes), lane_(threadIdx.x % lanes_) {}

  __device__ __forceinline__ void process(const Run& run) {
    const int rows = blockDim.x / lanes_;
    const std::int64_t positions = args_.shape.positions(), step = std::int64_t(gridDim.x) * rows;
    std::int64_t position = std::int64_t(blockIdx.x) * rows + threadIdx.x / lanes_;
    std::int64_t index = position < positions ? this->index_at(position) : 0;
    // All lanes of a warp go round equally often: in the end some have no row.
    for (; position - threadIdx.x % kWarp / lanes_ < positions; position += step) {
      const bool exists = kWhole || position < positions;
      Target<Acc> target = Base::no_target();
      if (exists) target = this->target_of(index);
      if (position + step < positions) index = this->index_at(position + step);
      row(exists ? position : -1, target);
    }
    if constexpr (kPass != Pass::backward) {
      this->finish_waiting(sums_);
      add_up(run.grid, args_.total, blockIdx.x, sums_);
    }
  }

 private:
  __device__ __forceinline__ static T nothing() { return convert<T>(-math::kInfinity<Acc>); }

  // position: -1 where there is none.
  __device__ __forceinline__ void row(std::int64_t position, const Target<Acc>& target) {
    const T* logits = static_cast<const T*>(args_.logits.data) + offset_of(args_.shape, args_.logits, position);
    const bool from_start = kPass == Pass::forward && plan_.from_start;
    const Span<const T, int> row(logits, position < 0 ? 0 : this->classes(), from_start);

    // Load. Of a row that is skipped nothing, and its exponentials are zeros.
    const int wanted = target.skip ? 0 : row.packets;
    Packet<T> packets[kPackets];
#pragma unroll
    for (Packet<T>& packet : packets) packet = Packet<T>::filled(nothing());
    if (from_start && !is_aligned(logits)) {
#pragma unroll
      for (int u = 0; u < kPackets; ++u) {
        if (lane_ + u * lanes_ < wanted) packets[u] = row.gather(lane_ + u * lanes_);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kPackets; ++u) {
        if (lane_ + u * lanes_ < wanted) packets[u] = row.load(lane_ + u * lanes_);
      }
    }
    T singles[kSingles], target_entry = nothing();
#pragma unroll
    for (int s = 0; s < kSingles; ++s) {
      const int i = lane_ + s * lanes_;
      singles[s] = i < row.singles && !target.skip ? logits[row.single(i)] : nothing();
    }
    if (target.index >= 0) target_entry = logits[target.index];

    // Reduce.
    Statistics statistics;
    Gradient gradient{};
    if constexpr (kPass == Pass::backward) {
      if (!target.skip) gradient = this->saved_gradient(position, target, Acc(0));
    } else {
      statistics.max = max_of(packets);
      for (const T single : singles) statistics.max = math::max_ignoring_nan(convert<Acc>(single), statistics.max);
      statistics.max = group_max(statistics.max, lanes_);
    }
    const Acc shift = kPass == Pass::backward ? gradient.shift : math::finite_shift(statistics.max);
    Acc e[kPerLane], single_e[kSingles];
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
#pragma unroll
    for (int s = 0; s < kSingles; ++s) {
      single_e[s] = Base::exp(convert<Acc>(singles[s]) - shift);
      statistics.sum += single_e[s];
    }
    if constexpr (kPass != Pass::backward) {
      statistics.sum = group_sum(statistics.sum, lanes_);
      const Acc target_logit = target.index < 0 ? Acc(0) : convert<Acc>(target_entry);
      this->finish_later(position, target, statistics, target_logit, lane_, lanes_, sums_);
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
      const int p = lane_ + u * lanes_;
      if (p >= row.packets) break;
      Acc x[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = math::logit_grad(e[u * kWidth + i], gradient.factor, Acc(0));
      store_packet(grad + row.first(p), Packet<T>::pack(x), aligned);
    }
#pragma unroll
    for (int s = 0; s < kSingles; ++s) {
      const int i = lane_ + s * lanes_;
      if (i < row.singles) grad[row.single(i)] = convert<T>(math::logit_grad(single_e[s], gradient.factor, Acc(0)));
    }
    // The target's entry once more, with its mass: by the lane that has just written it.
    if (target.index >= 0 && row.owner(target.index, lanes_) == lane_) {
      const Acc entry = this->entry_gradient(gradient, position, convert<Acc>(target_entry), target.index);
      grad[target.index] = convert<T>(entry);
    }
  }

  const WarpPlan& plan_;
  const int lanes_, lane_;  // of a row, and this one's place among them
  Sums sums_;
};

template <class T, Pass kPass, int kPerLane, bool kWhole>
__global__ void __launch_bounds__(kWarpRowThreads, kWarpBlocks<T, kPerLane>)
    cross_entropy_warps(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ WarpPlan plan,
                        const __grid_constant__ Run run) {
  Warps<T, kPass, kPerLane, kWhole>(args, plan, run).process(run);
}

}  // namespace fusedloss::cuda
