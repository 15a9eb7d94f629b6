// Cross entropy over many classes that lie side by side: a block for a row, or several.
//
// A row is read in packets, with one rescaling of its sum for all the packets that a thread has in flight. Where
// forward writes the gradient too, a thread keeps its packets in shared memory until the row's sums are known, so that
// memory is read once and written once; rows too large for one block's share are spread over a cluster of blocks, which
// read one another's sums. Without a gradient, or for backward, rows are spread over any number of blocks where there
// are few: the last block of a row to arrive adds up the parts in order.

#pragma once

#include "cluster.cuh"
#include "cross_entropy.cuh"

namespace fusedloss::cuda {

inline constexpr int kMaxWarps = kRowThreads / kWarp;

template <class T, bool kGeneral, Pass kPass, bool kCluster>
class Rows : CrossEntropy<T, kGeneral, kPass> {
  using Base = CrossEntropy<T, kGeneral, kPass>;
  using Base::args_;
  using typename Base::Acc;
  using Statistics = typename Base::Statistics;
  static constexpr int kWidth = kPacketOf<T>;
  static constexpr bool kKeeps = kPass == Pass::forward_with_gradient;
  // The packets of a thread that 64 registers hold beside the rest. The general code is large: it takes one at a time.
  static constexpr int kPacketsInFlight = kGeneral ? 1 : 16 / kWidth > 4 ? 4 : 16 / kWidth;

 public:
  __device__ __forceinline__ Rows(const CrossEntropyArgs& args, const RowPlan& plan, const Run& run, Packet<T>* kept)
      : Base(args, run), plan_(plan), kept_(kept) {}

  __device__ __forceinline__ void process(const Run& run) {
    const std::int64_t positions = args_.shape.positions();
    const int slice = blockIdx.x % plan_.slices;
    const std::int64_t step = gridDim.x / plan_.slices;
    Sums sums;
    for (std::int64_t position = blockIdx.x / plan_.slices; position < positions; position += step) {
      if constexpr (kPass == Pass::backward) {
        backward(position, slice);
      } else {
        forward(position, slice, run, sums);
      }
    }
    if constexpr (kPass != Pass::backward) {
      // Rows whose slices meet through memory have added to the total one by one, in `meet`.
      if (plan_.slices == 1) add_up(run.grid, args_.total, blockIdx.x, sums);
      if constexpr (kCluster) {
        if (slice == 0 && plan_.slices > 1) {
          add_up(run.grid, args_.total, blockIdx.x / plan_.slices, sums);
        }
        cluster_sync();  // no block may leave while its sums are still read
      }
    }
  }

 private:
  // The packets [begin, end) of a row.
  struct Slice {
    Packets<const T> packets;
    std::int64_t begin, end;
  };

  __device__ __forceinline__ Slice slice_of(std::int64_t position, int slice) const {
    const T* row = static_cast<const T*>(args_.logits.data) + offset_of(args_.shape, args_.logits, position);
    const Packets<const T> packets(row, this->classes());
    const std::int64_t begin = slice * plan_.slice_packets, end = begin + plan_.slice_packets;
    return {packets, begin, end < packets.size() ? end : packets.size()};
  }

  __device__ __forceinline__ T* gradient_row(std::int64_t position) const {
    return static_cast<T*>(args_.grad_logits.data) + offset_of(args_.shape, args_.grad_logits, position);
  }

  // Where a row has ended its packets are filled with this, which adds nothing.
  __device__ __forceinline__ static T nothing() { return convert<T>(-math::kInfinity<Acc>); }

  // Entry i of a packet that starts at class c, as the sums see it.
  __device__ __forceinline__ Acc value_of(const Packet<T>& packet, std::int64_t c, int i) const {
    const Acc x = convert<Acc>(packet.values[i]);
    if (!this->capped()) return x;
    return c + i >= 0 && c + i < this->classes() ? this->value(x) : x;
  }

  __device__ __forceinline__ Statistics statistics_of(std::int64_t position, const Slice& slice) const {
    Statistics row;
    const int threads = blockDim.x;
    for (std::int64_t p = slice.begin + threadIdx.x; p < slice.end; p += threads * kPacketsInFlight) {
      Packet<T> packets[kPacketsInFlight];
#pragma unroll
      for (int u = 0; u < kPacketsInFlight; ++u) {
        const std::int64_t at = p + u * threads;
        if (at < slice.end) {
          packets[u] = slice.packets.load(at, nothing());
        } else {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) packets[u].values[i] = nothing();
        }
      }
      Acc x[kPacketsInFlight * kWidth];
#pragma unroll
      for (int u = 0; u < kPacketsInFlight; ++u) {
        const std::int64_t c = slice.packets.first(p + u * threads);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[u * kWidth + i] = value_of(packets[u], c, i);
      }
      this->add(row, position, x, [&](int entry) {
        const std::int64_t at = p + entry / kWidth * threads, c = slice.packets.first(at) + entry % kWidth;
        return at < slice.end && c < this->classes() ? static_cast<int>(c) : -1;
      });
      if constexpr (kKeeps) {
#pragma unroll
        for (int u = 0; u < kPacketsInFlight; ++u) {
          if (p + u * threads < slice.end) kept_[p + u * threads - slice.begin] = packets[u];
        }
      }
    }
    return row;
  }

  // Merges the statistics of all threads of the block, or of its cluster; every thread gets the result. Two buffers
  // take turns: a thread may write its next part while another still reads the last ones.
  __device__ __forceinline__ Statistics merge_threads(Statistics row) {
    turn_ ^= 1;
    row = block_merge(row);
    if constexpr (kCluster) row = cluster_merge(row);
    return row;
  }

  __device__ __forceinline__ Statistics block_merge(Statistics row) const {
    __shared__ Statistics parts[2][kMaxWarps];
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    merge_lanes(row, kWarp);
    if (lane == 0) parts[turn_][warp] = row;
    __syncthreads();
    row = lane < warps ? parts[turn_][lane] : Statistics{};
    merge_lanes(row, kWarp);
    return row;
  }

  __device__ __forceinline__ Statistics cluster_merge(Statistics row) const {
    __shared__ Statistics exchanged[2];
    if (threadIdx.x == 0) exchanged[turn_] = row;
    cluster_sync();
    const int rank = threadIdx.x % kLargestCluster;
    row = rank < cluster_size() ? read_from_block(&exchanged[turn_], rank) : Statistics{};
    merge_lanes(row, kLargestCluster);
    return row;
  }

  __device__ __forceinline__ Acc target_logit(std::int64_t position, const Target<Acc>& target) const {
    if (target.index < 0) return Acc(0);
    const T* logits = static_cast<const T*>(args_.logits.data);
    return this->value(convert<Acc>(logits[offset_of(args_.shape, args_.logits, position) + target.index]));
  }

  __device__ __forceinline__ void forward(std::int64_t position, int slice_index, const Run& run, Sums& sums) {
    const Target<Acc> target = this->target(position);
    const Slice slice = slice_of(position, slice_index);
    const bool finishes = threadIdx.x == 0 && (!kCluster || slice_index == 0);
    Acc logit = Acc(0);
    if (finishes) logit = target_logit(position, target);  // before the gradient may take its place
    Statistics row;
    if (!target.skip) row = merge_threads(statistics_of(position, slice));
    if constexpr (!kCluster) {
      if (plan_.slices > 1) return meet(position, slice_index, run, row, target, logit);
    }
    if (finishes) this->finish_row(position, target, row, logit, sums);
    if constexpr (kPass == Pass::forward_with_gradient) {
      typename Base::Gradient gradient{};
      if (!target.skip) gradient = this->gradient(position, target, row);
      store_gradient(position, target, gradient, slice);
    }
  }

  // Slices of a row that are not a cluster's: the last block to arrive adds them up and finishes the row, and with it
  // a unit of the grid's work.
  __device__ __forceinline__ void meet(std::int64_t position, int slice, const Run& run, Statistics row,
                                       const Target<Acc>& target, Acc logit) const {
    Statistics* parts = static_cast<Statistics*>(plan_.parts) + position * plan_.slices;
    if (threadIdx.x == 0) parts[slice] = row;
    if (!is_last(plan_.tickets + position, plan_.slices)) return;
    Sums sums;
    if (threadIdx.x < kWarp) {
      row = Statistics{};
      for (int s = threadIdx.x; s < plan_.slices; s += kWarp) row.merge(parts[s]);
      merge_lanes(row, kWarp);
      if (threadIdx.x == 0) this->finish_row(position, target, row, logit, sums);
    }
    add_up(run.grid, args_.total, position, sums);
  }

  __device__ __forceinline__ void backward(std::int64_t position, int slice_index) const {
    const Target<Acc> target = this->target(position);
    const Slice slice = slice_of(position, slice_index);
    typename Base::Gradient gradient{};
    if (!target.skip) gradient = this->saved_gradient(position, target, probability_mass(position));
    if constexpr (kGeneral) {
      if (args_.grad_probabilities.data) {
        for (int c = threadIdx.x; c < this->classes(); c += blockDim.x) {
          this->store_probability_gradient(gradient, position, this->value(convert<Acc>(slice.packets.row[c])), c);
        }
        __syncthreads();  // the logits are read before their gradient may take their place
      }
    }
    if (args_.grad_logits.data) store_gradient(position, target, gradient, slice);
  }

  // The mass of a row of probabilities; its logits are not needed for it. Such rows are not sliced.
  __device__ __forceinline__ Acc probability_mass(std::int64_t position) const {
    if constexpr (kGeneral) {
      if (args_.has_probabilities) {
        Sums sums;
        for (int c = threadIdx.x; c < this->classes(); c += blockDim.x) {
          sums.loss += static_cast<double>(this->mass(position, c));
        }
        return static_cast<Acc>(block_sum_for_all(sums).loss);
      }
    }
    return Acc(0);
  }

  __device__ __forceinline__ void store_gradient(std::int64_t position, const Target<Acc>& target,
                                                 const typename Base::Gradient& gradient, const Slice& slice) const {
    const Packets<T> to(gradient_row(position), this->classes());
    for (std::int64_t p = slice.begin + threadIdx.x; p < slice.end; p += blockDim.x) {
      const std::int64_t c = slice.packets.first(p);
      Packet<T> packet;
      if (target.skip) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) packet.values[i] = convert<T>(Acc(0));
      } else {
        packet = kKeeps ? kept_[p - slice.begin] : slice.packets.load(p, nothing());
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const bool exists = !kGeneral || (c + i >= 0 && c + i < this->classes());
          if (!exists) continue;
          packet.values[i] = convert<T>(
              this->entry_gradient(gradient, position, convert<Acc>(packet.values[i]), static_cast<int>(c + i)));
        }
      }
      to.store(c, packet);
    }
  }

  const RowPlan& plan_;
  Packet<T>* const kept_;
  int turn_ = 0;
};

template <class T, bool kGeneral, Pass kPass, bool kCluster>
__global__ void __launch_bounds__(kRowThreads)
    cross_entropy_rows(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ RowPlan plan,
                       const __grid_constant__ Run run) {
  extern __shared__ __align__(16) unsigned char memory[];
  if constexpr (!kCluster || kHasClusters) {
    Rows<T, kGeneral, kPass, kCluster>(args, plan, run, reinterpret_cast<Packet<T>*>(memory)).process(run);
  }
}

}  // namespace fusedloss::cuda
