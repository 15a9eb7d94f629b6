// Cross entropy over few classes that lie side by side: tiles of whole rows.
//
// A block copies a tile of neighbouring rows into shared memory, as one stream of packets that knows nothing of rows,
// while it works on the tile before. A few lanes share a row, each with at most kPerLane of its entries in registers;
// the gradient takes the place of the logits in the tile and leaves as one stream again. Rows that do not follow one
// another in memory are copied entry by entry.

#pragma once

#include <cuda_pipeline.h>

#include "cross_entropy.cuh"

namespace fusedloss::cuda {

template <class T>
struct Tile {
  T* data;
  const TilePlan& plan;

  __device__ __forceinline__ T& at(int row, int c) const { return data[plan.start + row * plan.pitch + c]; }
  __device__ __forceinline__ T& flat(int e, int classes) const {
    const int row = plan.classes(e);
    return at(row, e - row * classes);
  }
};

// Four bytes, the grain in which a packet is copied where rows are padded.
using Word = std::uint32_t;

template <class T, bool kGeneral, Pass kPass, int kPerLane>
class Tiles : CrossEntropy<T, kGeneral, kPass> {
  using Base = CrossEntropy<T, kGeneral, kPass>;
  using Base::args_;
  using typename Base::Acc;
  using Statistics = typename Base::Statistics;

 public:
  __device__ __forceinline__ Tiles(const CrossEntropyArgs& args, const TilePlan& plan, const Run& run)
      : Base(args, run), plan_(plan) {}

  __device__ __forceinline__ void process(const Run& run, T* memory) const {
    const std::int64_t step = gridDim.x;
    // Two buffers take turns.
    const auto buffer = [&](int turn) { return Tile<T>{memory + turn * plan_.elements(), plan_}; };
    Sums sums;
    int turn = 0;
    if (blockIdx.x < plan_.tiles) copy_in(blockIdx.x, buffer(turn));
    __pipeline_commit();
    for (std::int64_t tile = blockIdx.x; tile < plan_.tiles; tile += step) {
      if (tile + step < plan_.tiles) copy_in(tile + step, buffer(turn ^ 1));
      __pipeline_commit();
      __pipeline_wait_prior(1);
      __syncthreads();
      row(tile, buffer(turn), sums);
      __syncthreads();
      if constexpr (kPass != Pass::forward) {
        if (args_.grad_logits.data) copy_out(tile, buffer(turn));
        __syncthreads();
      }
      turn ^= 1;
    }
    if constexpr (kPass != Pass::backward) add_up(run.grid, args_.total, blockIdx.x, sums);
  }

 private:
  __device__ __forceinline__ std::int64_t first_row(std::int64_t tile) const { return tile * plan_.rows; }
  __device__ __forceinline__ int rows_of(std::int64_t tile) const {
    const std::int64_t left = args_.shape.positions() - first_row(tile);
    return left < plan_.rows ? static_cast<int>(left) : plan_.rows;
  }
  __device__ __forceinline__ bool is_skipped(std::int64_t tile, int row) const {
    return this->target(first_row(tile) + row).skip;
  }

  __device__ __forceinline__ void copy_in(std::int64_t tile, const Tile<T>& to) const {
    const int classes = this->classes(), count = rows_of(tile) * classes;
    const T* logits = static_cast<const T*>(args_.logits.data);
    if (!plan_.stream) {
      for (int e = threadIdx.x; e < count; e += blockDim.x) {
        const int row = plan_.classes(e);
        const std::int64_t at = offset_of(args_.shape, args_.logits, first_row(tile) + row);
        to.at(row, e - row * classes) = logits[at + (e - row * classes)];
      }
      return;
    }
    const Packets<const T> packets(logits + first_row(tile) * classes, count);
    const bool padded = plan_.pitch != classes;
    for (int p = threadIdx.x; p < packets.size(); p += blockDim.x) {
      const int first = static_cast<int>(packets.first(p)), last = min(first + packets.kWidth, count) - 1;
      if (plan_.skips) {
        const int row = plan_.classes(max(first, 0)), last_row = plan_.classes(last);
        if (is_skipped(tile, row) && (row == last_row || (row + 1 == last_row && is_skipped(tile, last_row)))) continue;
      }
      if (!packets.is_whole(first)) {
        for (int e = max(first, 0); e <= last; ++e) to.flat(e, classes) = packets.row[e];
      } else if (!padded) {
        __pipeline_memcpy_async(to.data + plan_.start + first, packets.row + first, kPacketBytes);
      } else {
        T* place = &to.flat(first, classes);
        for (int w = 0; w < packets.kWidth; w += sizeof(Word) / sizeof(T)) {
          __pipeline_memcpy_async(place + w, packets.row + first + w, sizeof(Word));
        }
      }
    }
  }

  __device__ __forceinline__ void copy_out(std::int64_t tile, const Tile<T>& from) const {
    const int classes = this->classes(), count = rows_of(tile) * classes;
    T* grad = static_cast<T*>(args_.grad_logits.data);
    if (!plan_.grad_stream) {
      for (int e = threadIdx.x; e < count; e += blockDim.x) {
        const int row = plan_.classes(e);
        const std::int64_t at = offset_of(args_.shape, args_.grad_logits, first_row(tile) + row);
        grad[at + (e - row * classes)] = from.at(row, e - row * classes);
      }
      return;
    }
    const Packets<T> packets(grad + first_row(tile) * classes, count);
    const bool padded = plan_.pitch != classes;
    for (int p = threadIdx.x; p < packets.size(); p += blockDim.x) {
      const int first = static_cast<int>(packets.first(p));
      Packet<T> packet;
      if (!packets.is_whole(first)) {
        for (int e = max(first, 0); e < min(first + packets.kWidth, count); ++e) packets.row[e] = from.flat(e, classes);
        continue;
      }
      if (!padded) {
        packet = *reinterpret_cast<const Packet<T>*>(from.data + plan_.start + first);
      } else {
        const T* place = &from.flat(first, classes);
        for (int w = 0; w < kPacketBytes / sizeof(Word); ++w) {
          reinterpret_cast<Word*>(&packet)[w] = reinterpret_cast<const Word*>(place)[w];
        }
      }
      store_streaming(packets.row + first, packet);
    }
  }

  // A lane's entries of its row. Where entries need no more than their logit they are held in registers, and k counts
  // them: a constant of the unrolled code. The general code would grow too large, and reads the tile again each time.
  static constexpr bool kInRegisters = !kGeneral;

  // Calls body(k, c); whether an entry is passed over is the same for all lanes of the block.
  template <class Body>
  __device__ __forceinline__ void for_each_entry(Body body) const {
    const int classes = this->classes(), lane = threadIdx.x % plan_.lanes;
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        if (k * plan_.lanes < classes) body(k, k * plan_.lanes + lane);
      }
    } else {
#pragma unroll 1
      for (int c = lane; c < classes; c += plan_.lanes) body(0, c);
    }
  }

  __device__ __forceinline__ void row(std::int64_t tile, const Tile<T>& logits, Sums& sums) const {
    const int classes = this->classes(), row = threadIdx.x / plan_.lanes, lane = threadIdx.x % plan_.lanes;
    const bool exists = row < rows_of(tile);
    const std::int64_t position = first_row(tile) + row;
    Target<Acc> target{-1, false, true, Acc(0)};
    if (exists) target = this->target(position);
    const bool used = !target.skip;
    const auto in_tile = [&](int c) { return used && c < classes ? convert<Acc>(logits.at(row, c)) : nothing(); };

    Acc registers[kInRegisters ? kPerLane : 1]{};
    if constexpr (kInRegisters) {
      for_each_entry([&](int k, int c) { registers[k] = in_tile(c); });
    }
    const auto entry = [&](int k, int c) {
      return kInRegisters ? registers[k] : used ? this->value(in_tile(c)) : nothing();
    };

    Statistics statistics;
    if (kPass != Pass::backward || this->problem_.probabilities) {
      Acc max = nothing();
      for_each_entry([&](int k, int c) { max = math::max_ignoring_nan(entry(k, c), max); });
      max = group_reduce(max, plan_.lanes, [](Acc a, Acc b) { return math::max_ignoring_nan(a, b); });
      statistics.max = max;
      const Acc shift = math::finite_shift(max);
      for_each_entry([&](int k, int c) {
        const Acc shifted = entry(k, c) - shift;
        statistics.sum += Base::exp(shifted);
        if constexpr (kGeneral) {
          if (this->problem_.dense() && used) {
            const Acc mass = this->mass(position, c);
            statistics.dense_loss += math::entry_loss_at_max(shifted, mass);
            statistics.mass += static_cast<double>(mass);
          }
        }
      });
      const auto add = [](Acc a, Acc b) { return a + b; };
      statistics.sum = group_reduce(statistics.sum, plan_.lanes, add);
      if constexpr (kGeneral) {
        statistics.dense_loss = group_reduce(statistics.dense_loss, plan_.lanes, add);
        statistics.mass = group_reduce(statistics.mass, plan_.lanes, [](double a, double b) { return a + b; });
      }
    }
    if constexpr (kPass != Pass::backward) {
      if (exists && lane == 0) {
        const Acc logit = target.index < 0 ? Acc(0) : this->value(in_tile(target.index));
        this->finish_row(position, target, statistics, logit, sums);
      }
    }
    if constexpr (kPass != Pass::forward) {
      __syncwarp();  // the target's logit is read before its gradient takes its place
      if (exists) gradients(position, row, target, statistics, logits, registers);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void gradients(std::int64_t position, int row, const Target<Acc>& target,
                                            const Statistics& statistics, const Tile<T>& tile,
                                            const Acc (&registers)[kCount]) const {
    const int classes = this->classes();
    typename Base::Gradient gradient{};
    if constexpr (kPass == Pass::backward) {
      if (!target.skip) gradient = this->saved_gradient(position, target, this->mass_of(statistics));
    } else {
      if (!target.skip) gradient = this->gradient(position, target, statistics);
    }
    for_each_entry([&](int k, int c) {
      if (c >= classes) return;
      T& place = tile.at(row, c);
      const Acc x = target.skip ? Acc(0) : kInRegisters ? registers[k] : convert<Acc>(place);
      if constexpr (kPass == Pass::backward && kGeneral) {
        if (args_.grad_probabilities.data) {
          this->store_probability_gradient(gradient, position, this->value(x), c);
        }
      }
      place = convert<T>(target.skip ? Acc(0) : this->entry_gradient(gradient, position, x, c));
    });
  }

  __device__ __forceinline__ static Acc nothing() { return -math::kInfinity<Acc>; }

  const TilePlan& plan_;
};

template <class T, bool kGeneral, Pass kPass, int kPerLane>
__global__ void __launch_bounds__(kTileThreads, kPerLane > 16 ? 2 : 4)
    cross_entropy_tiles(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ TilePlan plan,
                        const __grid_constant__ Run run) {
  extern __shared__ __align__(16) unsigned char memory[];
  Tiles<T, kGeneral, kPass, kPerLane>(args, plan, run).process(run, reinterpret_cast<T*>(memory));
}

}  // namespace fusedloss::cuda
