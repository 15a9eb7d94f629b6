// Cross entropy over many classes that lie side by side: a block for a row, or several.
//
// A thread asks for several packets before it uses the first, and has one running sum; then the threads merge theirs.
// Where forward writes the gradient too, packets wait in shared memory until the row's sums are known, so that memory
// is read once and written once; rows too large for one block's share are spread over a cluster of blocks, which read
// one another's sums. Without a gradient, or for backward, rows are spread over any number of blocks where there are
// few: the last block of a row to arrive adds up the parts in order.
//
// The elements before a row's first aligned packet and behind its last one are single: each has a thread of its own.

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
  using typename Base::Gradient;
  using Statistics = typename Base::Statistics;
  static constexpr int kWidth = kPacketOf<T>;
  static constexpr bool kKeeps = kPass == Pass::forward_with_gradient;
  // Packets of a thread that 64 registers hold beside the rest. The general code is large: it takes one at a time.
  static constexpr int kInFlight = kGeneral ? 1 : 4;

 public:
  __device__ __forceinline__ Rows(const CrossEntropyArgs& args, const RowPlan& plan, const Run& run, Packet<T>* kept)
      : Base(args, run), plan_(plan), kept_(kept) {}

  __device__ __forceinline__ void process(const Run& run) {
    const std::int64_t positions = args_.shape.positions();
    const std::int64_t step = gridDim.x / plan_.slices;
    const int slice = blockIdx.x % plan_.slices;
    std::int64_t position = blockIdx.x / plan_.slices;
    Sums sums;
    std::int64_t index = position < positions ? this->index_at(position) : 0;
    for (; position < positions; position += step) {
      const Target<Acc> target = this->target_of(index);
      // On its way while this row is read: a row is not begun before it is known whether it counts.
      if (position + step < positions) index = this->index_at(position + step);
      if constexpr (kPass == Pass::backward) {
        backward(position, slice, target);
      } else {
        forward(position, slice, target, run, sums);
      }
    }
    if constexpr (kPass != Pass::backward) {
      // Rows whose slices meet through memory have added to the total one by one, in `meet`.
      if (plan_.slices == 1) add_up(run.grid, args_.total, blockIdx.x, sums);
      if constexpr (kCluster) {
        if (slice == 0 && plan_.slices > 1) add_up(run.grid, args_.total, blockIdx.x / plan_.slices, sums);
        cluster_sync();  // no block may leave while its sums are still read
      }
    }
  }

 private:
  // A row, and what this thread has of it: every blockDim.x-th packet from its own on, and perhaps a single element.
  struct Row : Span<const T, int> {
    int first_packet, end;
    int single;  // its class; -1: none
  };

  __device__ __forceinline__ Row row_of(std::int64_t position, int slice) const {
    const T* data = static_cast<const T*>(args_.logits.data) + offset_of(args_.shape, args_.logits, position);
    const Span<const T, int> span(data, this->classes());
    const int begin = slice * plan_.slice_packets, end = min(begin + plan_.slice_packets, span.packets);
    const bool has_single = slice == 0 && int(threadIdx.x) < span.singles;
    return {span, begin, end, has_single ? span.single(int(threadIdx.x)) : -1};
  }

  __device__ __forceinline__ static T nothing() { return convert<T>(-math::kInfinity<Acc>); }

  // --- Statistics ---

  __device__ __forceinline__ Statistics statistics_of(std::int64_t position, const Row& row) const {
    Statistics statistics;
    const T single = row.single >= 0 ? row.data[row.single] : nothing();
    int p = row.first_packet;
    for (; p + kInFlight * int(blockDim.x) <= row.end; p += kInFlight * int(blockDim.x)) {
      read<true>(statistics, position, row, p + int(threadIdx.x));
    }
    if (p + int(threadIdx.x) < row.end) read<false>(statistics, position, row, p + int(threadIdx.x));
    if (row.singles > 0) {
      const Acc x[] = {row.single < 0 ? convert<Acc>(single) : this->value(convert<Acc>(single))};
      this->add(statistics, position, x, [&](int) { return row.single; });
    }
    return statistics;
  }

  // kInFlight packets from p on; those that are not whole end with the slice.
  template <bool kWhole>
  __device__ __forceinline__ void read(Statistics& statistics, std::int64_t position, const Row& row, int p) const {
    Packet<T> packets[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      packets[u] = Packet<T>::filled(nothing());
      if (kWhole || p + u * int(blockDim.x) < row.end) packets[u] = row.load(p + u * int(blockDim.x));
    }
    if constexpr (kGeneral) {
      Acc x[kWidth];
      packets[0].unpack(x);
      for (Acc& entry : x) entry = this->value(entry);
      this->add(statistics, position, x, [&](int i) { return row.first(p) + i; });
    } else {
      this->add(statistics, packets);
    }
    if constexpr (kKeeps) {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (kWhole || p + u * int(blockDim.x) < row.end) kept_[p + u * int(blockDim.x) - row.first_packet] = packets[u];
      }
    }
  }

  // Every thread of the team gets the result. Two buffers take turns: a thread may write its next part while another
  // still reads the last ones.
  __device__ __forceinline__ Statistics merge(Statistics row) {
    row = merge_warps(row);
    if constexpr (kCluster) row = merge_blocks(row);
    turn_ ^= 1;
    return row;
  }

  __device__ __forceinline__ Statistics merge_warps(Statistics row) const {
    __shared__ Statistics parts[2][kMaxWarps];
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    merge_lanes(row);
    if (lane == 0) parts[turn_][warp] = row;
    __syncthreads();
    row = lane < warps ? parts[turn_][lane] : Statistics{};
    merge_lanes(row);
    return row;
  }

  __device__ __forceinline__ Statistics merge_blocks(Statistics row) const {
    __shared__ Statistics exchanged[2];
    if (threadIdx.x == 0) exchanged[turn_] = row;
    cluster_sync();
    const int rank = threadIdx.x % kLargestCluster;
    row = rank < cluster_size() ? read_from_block(&exchanged[turn_], rank) : Statistics{};
    merge_lanes(row, kLargestCluster);
    return row;
  }

  // --- Forward ---

  __device__ __forceinline__ void forward(std::int64_t position, int slice, const Target<Acc>& target, const Run& run,
                                          Sums& sums) {
    const Row row = row_of(position, slice);
    const bool finishes = threadIdx.x == 0 && (!kCluster || slice == 0);
    T logit = nothing();  // of the target, before the gradient may take its place
    if (finishes && target.index >= 0) logit = row.data[target.index];
    Statistics statistics;
    if (!target.skip) statistics = merge(statistics_of(position, row));
    const Acc target_logit = target.index < 0 ? Acc(0) : this->value(convert<Acc>(logit));
    if constexpr (kPass == Pass::forward) {
      if (plan_.slices > 1) return meet(position, slice, run, statistics, target, target_logit);
    }
    if (finishes) this->finish_row(position, target, statistics, target_logit, sums);
    if constexpr (kPass == Pass::forward_with_gradient) {
      Gradient gradient{};
      if (!target.skip) gradient = this->gradient(position, target, statistics);
      write(position, row, target, gradient);
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
      merge_lanes(row);
      if (threadIdx.x == 0) this->finish_row(position, target, row, logit, sums);
    }
    add_up(run.grid, args_.total, position, sums);
  }

  // --- Gradient ---

  __device__ __forceinline__ void backward(std::int64_t position, int slice, const Target<Acc>& target) const {
    const Row row = row_of(position, slice);
    Gradient gradient{};
    if (!target.skip) gradient = this->saved_gradient(position, target, probability_mass(position));
    if constexpr (kGeneral) {
      if (args_.grad_probabilities.data) {
        for (int c = int(threadIdx.x); c < this->classes(); c += int(blockDim.x)) {
          this->store_probability_gradient(gradient, position, this->value(convert<Acc>(row.data[c])), c);
        }
        __syncthreads();  // the logits are read before their gradient may take their place
      }
    }
    if (args_.grad_logits.data) write(position, row, target, gradient);
  }

  // The mass of a row of probabilities; its logits are not needed for it. Such rows are not sliced.
  __device__ __forceinline__ Acc probability_mass(std::int64_t position) const {
    if constexpr (kGeneral) {
      if (args_.has_probabilities) {
        Sums sums;
        for (int c = int(threadIdx.x); c < this->classes(); c += int(blockDim.x)) {
          sums.loss += static_cast<double>(this->mass(position, c));
        }
        return static_cast<Acc>(block_sum_for_all(sums).loss);
      }
    }
    return Acc(0);
  }

  // Where a row's gradient goes.
  struct Destination {
    T* data;
    bool aligned;  // with packets where the logits have theirs

    __device__ __forceinline__ void store(int c, const Packet<T>& packet) const {
      if (aligned) return store_streaming(data + c, packet);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) data[c + i] = packet.values[i];
    }
  };

  __device__ __forceinline__ void write(std::int64_t position, const Row& row, const Target<Acc>& target,
                                        const Gradient& gradient) const {
    T* data = static_cast<T*>(args_.grad_logits.data) + offset_of(args_.shape, args_.grad_logits, position);
    const Destination to{data, misalignment(data) == misalignment(row.data)};
    if (target.skip) {
      for (int p = row.first_packet + int(threadIdx.x); p < row.end; p += int(blockDim.x))
        to.store(row.first(p), Packet<T>::filled(convert<T>(Acc(0))));
      if (row.single >= 0) data[row.single] = convert<T>(Acc(0));
      return;
    }
    // The target's entry is written twice by the same thread, at last with its own mass. Its logit is read before.
    const bool owns_target = !kGeneral && this->owns(row, target.index);
    const T target_logit = owns_target ? row.data[target.index] : nothing();
    const T single = row.single >= 0 ? row.data[row.single] : nothing();
    int p = row.first_packet;
    for (; p + kInFlight * int(blockDim.x) <= row.end; p += kInFlight * int(blockDim.x)) {
      write_packets<true>(position, row, gradient, p + int(threadIdx.x), to);
    }
    if (p + int(threadIdx.x) < row.end) write_packets<false>(position, row, gradient, p + int(threadIdx.x), to);
    if (row.single >= 0) {
      data[row.single] = convert<T>(this->entry_gradient(gradient, position, convert<Acc>(single), row.single));
    }
    if (owns_target) {
      data[target.index] =
          convert<T>(this->entry_gradient(gradient, position, convert<Acc>(target_logit), target.index));
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void write_packets(std::int64_t position, const Row& row, const Gradient& gradient, int p,
                                                const Destination& to) const {
    Packet<T> packets[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int at = p + u * int(blockDim.x);
      if (kWhole || at < row.end) packets[u] = kKeeps ? kept_[at - row.first_packet] : row.load(at);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int at = p + u * int(blockDim.x);
      if (!kWhole && at >= row.end) break;
      Acc x[kWidth];
      packets[u].unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if constexpr (kGeneral) {
          x[i] = this->entry_gradient(gradient, position, x[i], row.first(at) + i);
        } else {
          x[i] = this->other_entry_gradient(gradient, x[i]);
        }
      }
      to.store(row.first(at), Packet<T>::pack(x));
    }
  }

  // Whether this thread writes the entry of a class; -1 is none.
  __device__ __forceinline__ bool owns(const Row& row, int c) const {
    if (c < 0) return false;
    const int in_body = c - row.head, p = in_body / kWidth;
    if (in_body < 0 || p >= row.packets) return row.single == c;
    return p >= row.first_packet && p < row.end && (p - row.first_packet) % int(blockDim.x) == int(threadIdx.x);
  }

  const RowPlan& plan_;
  Packet<T>* kept_;
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
