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

// kAnswers: see CrossEntropy. Where entries need no more than their logit, such rows are read as quickly as others:
// what a thread adds up of a turn is float32, and the class of the largest logit is not looked for. In the end the
// threads that have met the row's largest logit look at their turn again: for its class, and for the digits that the
// sum of a peaked row has lost beside 1.
template <class T, bool kGeneral, Pass kPass, bool kCluster, bool kAnswers = kGeneral>
class Rows : CrossEntropy<T, kGeneral, kPass, kAnswers, true> {
  using Base = CrossEntropy<T, kGeneral, kPass, kAnswers, true>;
  using Base::args_;
  using typename Base::Acc;
  using typename Base::Gradient;
  using typename Base::Statistics;
  static constexpr int kWidth = kPacketOf<T>;
  static constexpr bool kKeeps = kPass == Pass::forward_with_gradient;
  // Packets of a thread that 64 registers hold beside the rest. The general code is large: it takes one at a time.
  static constexpr int kInFlight = kGeneral ? 1 : 4;
  static constexpr bool kLooksAgain = kAnswers && !kGeneral;
  static constexpr int kMaxWarps = row_threads(sizeof(T)) / kWarp;

 public:
  __device__ __forceinline__ Rows(const CrossEntropyArgs& args, const RowPlan& plan, const Run& run, Packet<T>* kept)
      : Base(args, run), plan_(plan), kept_(kept) {}

  __device__ __forceinline__ void process(const Run& run) {
    const std::int64_t positions = args_.shape.positions(), step = gridDim.x / plan_.slices;
    const int slice = blockIdx.x % plan_.slices;
    std::int64_t position = blockIdx.x / plan_.slices;
    std::int64_t index = position < positions ? this->index_at(position) : 0;
    Sums sums;
    for (; position < positions; position += step) {
      const Target<Acc> target = this->target_of(index);
      // On its way while this row is read: a row does not begin before it is known whether it counts.
      if (position + step < positions) index = this->index_at(position + step);
      const Row row = row_of(position, slice);
      if constexpr (kPass == Pass::backward) {
        backward(row, target);
      } else {
        forward(row, target, run, sums);
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
  // A row, and this block's slice of its packets: [begin, end). A thread has every threads_-th of them from its own on,
  // and perhaps a single element.
  struct Row : Span<const T, int> {
    std::int64_t position;
    int slice, begin, end;
    int single;     // its class; -1: none
    bool gathered;  // packets start with the row, which is not aligned
  };

  __device__ __forceinline__ Row row_of(std::int64_t position, int slice) const {
    const T* data = static_cast<const T*>(args_.logits.data) + offset_of(args_.shape, args_.logits, position);
    const bool from_start = kPass == Pass::forward && plan_.from_start;
    const Span<const T, int> span(data, this->classes(), from_start);
    const int begin = slice * plan_.slice_packets, end = min(begin + plan_.slice_packets, span.packets);
    const bool has_single = slice == 0 && thread_ < span.singles;
    return {span, position, slice, begin, end, has_single ? span.single(thread_) : -1, from_start && !is_aligned(data)};
  }

  // Calls body<kWhole>(p) for kInFlight packets at a time, of which p is this thread's first. They all exist but for
  // the last ones, where kWhole is false.
  template <class Body>
  __device__ __forceinline__ void for_each_turn(const Row& row, Body body) const {
    int first = row.begin;
    for (; first + kInFlight * threads_ <= row.end; first += kInFlight * threads_) {
      body.template operator()<true>(first + thread_);
    }
    if (first + thread_ < row.end) body.template operator()<false>(first + thread_);
  }

  __device__ __forceinline__ static T nothing() { return convert<T>(-math::kInfinity<Acc>); }

  // --- Statistics ---

  // The turn in which a thread has met its largest logit.
  struct Turn {
    int p = -1;   // the thread's first packet of it; -1: it was the single element
    Acc sum = 0;  // of the turn's exponentials
  };

  // The packets from p on, as far as they exist; the others are -inf.
  template <bool kWhole>
  __device__ __forceinline__ void load_turn(const Row& row, int p, Packet<T> (&packets)[kInFlight]) const {
    const auto load = [&](auto from) {
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        packets[u] = Packet<T>::filled(nothing());
        if (kWhole || p + u * threads_ < row.end) packets[u] = from(p + u * threads_);
      }
    };
    if (row.gathered) {
      load([&](int p) { return row.gather(p); });
    } else {
      load([&](int p) { return row.load(p); });
    }
  }

  __device__ __forceinline__ Statistics statistics_of(const Row& row, Turn& largest) const {
    Statistics statistics;
    const T single = row.single < 0 ? nothing() : row.data[row.single];
    for_each_turn(row, [&]<bool kWhole>(int p) {
      Packet<T> packets[kInFlight];
      load_turn<kWhole>(row, p, packets);
      if constexpr (kLooksAgain) {
        add_turn<kWhole>(statistics, largest, row, p, packets);
      } else {
        add(statistics, row, p, packets);
      }
      if constexpr (kKeeps) {
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          if (kWhole || p + u * threads_ < row.end) kept_[p + u * threads_ - row.begin] = packets[u];
        }
      }
    });
    if (row.singles > 0) {
      const Acc x[] = {convert<Acc>(single)};
      const Acc before = statistics.max;
      Base::add(statistics, row.position, x, [&](int) { return row.single; });
      if (statistics.max > before) largest.p = -1;
    }
    return statistics;
  }

  // With the entropy's share, which takes an instruction for each logit.
  template <bool kWhole>
  __device__ __forceinline__ void add_turn(Statistics& statistics, Turn& largest, const Row& row, int p,
                                           const Packet<T> (&packets)[kInFlight]) const {
    const Acc max = max_of(packets);
    const bool is_larger = max > statistics.max;
    if (is_larger) statistics.raise(max);
    const Acc shift = math::finite_shift(statistics.max);
    Acc sum, gap;
    const auto add_up = [&](const Packet<T>(&packets)[kInFlight], auto times_gap) {
      sum = gap = Acc(0);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        Acc x[kWidth];
        packets[u].unpack(x);
#pragma unroll
        for (const Acc entry : x) {
          const Acc shifted = entry - shift, e = Base::exp(shifted);
          sum += e;
          gap += times_gap(e, shifted);
        }
      }
    };
    const auto times_finite_gap = [](Acc e, Acc shifted) { return math::times_gap(e, shifted); };
    if constexpr (kWhole) {
      add_up(packets, [](Acc e, Acc shifted) { return e * -shifted; });
      if (gap != gap) {  // a logit of -inf
        // Loaded once more: there are no registers to keep exponentials for what is rare.
        Packet<T> again[kInFlight];
        load_turn<kWhole>(row, p, again);
        add_up(again, times_finite_gap);
      }
    } else {
      add_up(packets, times_finite_gap);
    }
    statistics.sum += static_cast<double>(sum);
    statistics.gap += static_cast<double>(gap);
    if (is_larger) largest = {p, sum};
  }

  // own: this thread's statistics; all: those of the block. All threads call this.
  __device__ __forceinline__ Statistics look_again(const Row& row, const Statistics& own, const Turn& turn,
                                                   Statistics all) {
    constexpr double kPeaked = 1.0625;  // beside a larger sum the lost digits are none of the entropy's
    struct Found {
      double missing;  // in the sum
      int first;       // class
    };
    __shared__ Found found;
    const bool is_peaked = this->has_entropy() && all.sum < kPeaked;
    if (all.max == -math::kInfinity<Acc> || !(is_peaked || this->has_argmax())) return all;
    if (all.sum != all.sum) return look_everywhere(row, all);
    if (thread_ == 0) found = {0, this->classes()};
    __syncthreads();
    if (own.max == all.max) {
      int first = this->classes();
      if (row.single >= 0 && convert<Acc>(row.data[row.single]) == all.max) first = row.single;
      double sum = 0;
#pragma unroll 1
      for (int u = 0; u < kInFlight && turn.p >= 0; ++u) {
        const int p = turn.p + u * threads_;
        if (p >= row.end) break;
#pragma unroll 1
        for (int c = row.first(p); c < row.first(p) + kWidth; ++c) {
          const Acc x = convert<Acc>(row.data[c]);
          sum += static_cast<double>(Base::exp(x - all.max));
          if (x == all.max) first = min(first, c);
        }
      }
      atomicMin(&found.first, first);
      // By one thread alone: the sum of two would not be peaked.
      if (is_peaked && turn.p >= 0) found.missing = sum - static_cast<double>(turn.sum);
    }
    __syncthreads();
    all.sum += found.missing;
    if (this->has_argmax()) all.largest = {all.max, found.first};
    return all;
  }

  // Where there is a NaN among the logits, or an infinity.
  __device__ __forceinline__ Statistics look_everywhere(const Row& row, Statistics all) {
    Statistics looked;
#pragma unroll 1
    for (int p = row.begin + thread_; p < row.end; p += threads_) {
#pragma unroll 1
      for (int c = row.first(p); c < row.first(p) + kWidth; ++c) looked.largest.look(convert<Acc>(row.data[c]), c);
    }
    if (row.single >= 0) looked.largest.look(convert<Acc>(row.data[row.single]), row.single);
    all.largest = merge(looked).largest;
    return all;
  }

  __device__ __forceinline__ void add(Statistics& statistics, const Row& row, int p,
                                      const Packet<T> (&packets)[kInFlight]) const {
    if constexpr (kGeneral) {
      Acc x[kWidth];
      packets[0].unpack(x);
      Base::add(statistics, row.position, x, [&](int i) { return row.first(p) + i; });
    } else {
      Base::add(statistics, packets);
    }
  }

  // Every thread gets the statistics of all, over the block or the cluster. Two buffers take turns: a thread may write
  // its next part while another still reads the last ones.
  __device__ __forceinline__ Statistics merge(Statistics row) {
    turn_ ^= 1;
    row = merge_warps(row);
    if constexpr (kCluster) row = merge_blocks(row);
    return row;
  }

  __device__ __forceinline__ Statistics merge_warps(Statistics row) const {
    __shared__ Statistics parts[2][kMaxWarps];
    const int warps = threads_ / kWarp, warp = thread_ / kWarp, lane = thread_ % kWarp;
    this->merge_lanes(row);
    if (lane == 0) parts[turn_][warp] = row;
    __syncthreads();
    row = lane < warps ? parts[turn_][lane] : Statistics{};
    this->merge_lanes(row);
    return row;
  }

  __device__ __forceinline__ Statistics merge_blocks(Statistics row) const {
    __shared__ Statistics exchanged[2];
    if (thread_ == 0) exchanged[turn_] = row;
    cluster_sync();
    const int rank = thread_ % kLargestCluster;
    row = rank < cluster_size() ? read_from_block(&exchanged[turn_], rank) : Statistics{};
    this->merge_lanes(row, kLargestCluster);
    return row;
  }

  // --- Forward ---

  __device__ __forceinline__ void forward(const Row& row, const Target<Acc>& target, const Run& run, Sums& sums) {
    const bool finishes = thread_ == 0 && (!kCluster || row.slice == 0);
    T target_entry = nothing();
    if (finishes && target.index >= 0) target_entry = row.data[target.index];  // before its gradient takes its place
    Statistics statistics;
    if (!target.skip) {
      Turn turn;
      const Statistics own = statistics_of(row, turn);
      statistics = merge(own);
      if constexpr (kLooksAgain) statistics = look_again(row, own, turn, statistics);
    }
    const Acc target_logit = target.index < 0 ? Acc(0) : this->value(convert<Acc>(target_entry));
    if constexpr (kPass == Pass::forward) {
      if (plan_.slices > 1) return meet(row, target, run, statistics, target_logit);
    }
    if (finishes) {
      this->store_argmax(row.position, statistics);
      this->finish_row(row.position, target, statistics, target_logit, sums);
    }
    if constexpr (kPass == Pass::forward_with_gradient) {
      Gradient gradient{};
      if (!target.skip) gradient = this->gradient(row.position, target, statistics);
      write(row, target, gradient);
    }
  }

  // Slices of a row that are not a cluster's: the last block to arrive adds them up and finishes the row, and with it
  // a unit of the grid's work.
  __device__ __forceinline__ void meet(const Row& row, const Target<Acc>& target, const Run& run, Statistics statistics,
                                       Acc target_logit) const {
    Statistics* parts = static_cast<Statistics*>(plan_.parts) + row.position * plan_.slices;
    if (thread_ == 0) parts[row.slice] = statistics;
    if (!is_last(plan_.tickets + row.position, plan_.slices)) return;
    Sums sums;
    if (thread_ < kWarp) {
      statistics = Statistics{};
      for (int s = thread_; s < plan_.slices; s += kWarp) statistics.merge(parts[s]);
      this->merge_lanes(statistics);
      if (thread_ == 0) {
        this->store_argmax(row.position, statistics);
        this->finish_row(row.position, target, statistics, target_logit, sums);
      }
    }
    add_up(run.grid, args_.total, row.position, sums);
  }

  // --- Gradient ---

  __device__ __forceinline__ void backward(const Row& row, const Target<Acc>& target) const {
    Gradient gradient{};
    if (!target.skip) gradient = this->saved_gradient(row.position, target, probability_mass(row.position));
    if constexpr (kGeneral) {
      if (args_.grad_probabilities.data) {
        for (int c = thread_; c < this->classes(); c += threads_) {
          this->store_probability_gradient(gradient, row.position, this->value(convert<Acc>(row.data[c])), c);
        }
        __syncthreads();  // the logits are read before their gradient may take their place
      }
    }
    if (args_.grad_logits.data) write(row, target, gradient);
  }

  // The mass of a row of probabilities; its logits are not needed for it. Such rows are not sliced.
  __device__ __forceinline__ Acc probability_mass(std::int64_t position) const {
    if constexpr (kGeneral) {
      if (args_.has_probabilities) {
        Sums sums;
        for (int c = thread_; c < this->classes(); c += threads_) {
          sums.loss += static_cast<double>(this->mass(position, c));
        }
        return static_cast<Acc>(block_sum_for_all(sums).loss);
      }
    }
    return Acc(0);
  }

  __device__ __forceinline__ void write(const Row& row, const Target<Acc>& target, const Gradient& gradient) const {
    T* grad = static_cast<T*>(args_.grad_logits.data) + offset_of(args_.shape, args_.grad_logits, row.position);
    const bool aligned = misalignment(grad) == misalignment(row.data);
    if (Base::has_no_gradient(target)) {
      for (int p = row.begin + thread_; p < row.end; p += threads_) {
        store_packet(grad + row.first(p), Packet<T>::filled(convert<T>(Acc(0))), aligned);
      }
      if (row.single >= 0) grad[row.single] = convert<T>(Acc(0));
      return;
    }
    const T single = row.single < 0 ? nothing() : row.data[row.single];
    const bool owns_target = owns(row, target.index);
    const T target_entry = owns_target ? row.data[target.index] : nothing();
    for_each_turn(row, [&]<bool kWhole>(int p) {
      Packet<T> packets[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int at = p + u * threads_;
        if (kWhole || at < row.end) packets[u] = kKeeps ? kept_[at - row.begin] : row.load(at);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int at = p + u * threads_;
        if (!kWhole && at >= row.end) break;
        Acc x[kWidth];
        packets[u].unpack(x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[i] = other_entry_gradient(row, gradient, x[i], row.first(at) + i);
        store_packet(grad + row.first(at), Packet<T>::pack(x), aligned);
      }
    });
    const auto entry_gradient = [&](T entry, int c) {
      return convert<T>(this->entry_gradient(gradient, row.position, convert<Acc>(entry), c));
    };
    if (row.single >= 0) grad[row.single] = entry_gradient(single, row.single);
    // Once more, with its mass, by the thread that has just written it.
    if (owns_target) grad[target.index] = entry_gradient(target_entry, target.index);
  }

  __device__ __forceinline__ Acc other_entry_gradient(const Row& row, const Gradient& gradient, Acc x, int c) const {
    if constexpr (kGeneral) return this->entry_gradient(gradient, row.position, x, c);
    return Base::other_entry_gradient(gradient, x);
  }

  // Whether this thread writes the entry of a class; -1 is none.
  __device__ __forceinline__ bool owns(const Row& row, int c) const {
    if (kGeneral || c < 0) return false;
    const int p = row.packet_of(c);
    return p < 0 ? c == row.single : p >= row.begin && p < row.end && (p - row.begin) % threads_ == thread_;
  }

  const RowPlan& plan_;
  Packet<T>* const kept_;
  const int thread_ = threadIdx.x, threads_ = blockDim.x;
  int turn_ = 0;
};

template <class T, bool kGeneral, Pass kPass, bool kCluster>
__global__ void __launch_bounds__(row_threads(sizeof(T)))
    cross_entropy_rows(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ RowPlan plan,
                       const __grid_constant__ Run run) {
  extern __shared__ __align__(16) unsigned char memory[];
  if constexpr (!kCluster || kHasClusters) {
    Rows<T, kGeneral, kPass, kCluster>(args, plan, run, reinterpret_cast<Packet<T>*>(memory)).process(run);
  }
}

// Forward with an entropy or an argmax, where entries need no more than their logit.
template <class T>
__global__ void __launch_bounds__(row_threads(sizeof(T)))
    cross_entropy_answers(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ RowPlan plan,
                          const __grid_constant__ Run run) {
  Rows<T, false, Pass::forward, false, true>(args, plan, run, nullptr).process(run);
}

}  // namespace fusedloss::cuda
