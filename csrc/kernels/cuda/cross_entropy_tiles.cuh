// Cross entropy over few classes that lie side by side: tiles of whole rows.
//
// A block copies a tile of neighbouring rows into shared memory, as one stream of packets that knows nothing of rows,
// while it works on the tile before. A few lanes share a row; a lane's entries become their exponentials, and those the
// gradient, which takes the place of the logits in the tile and leaves as one stream again. Rows that do not follow one
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
  // Entry e of all rows together.
  __device__ __forceinline__ T& flat(int e, int classes) const {
    const int row = plan.classes(e);
    return at(row, e - row * classes);
  }
};

// Four bytes, the grain in which a packet is copied where rows are padded.
using Word = std::uint32_t;

// kLanes share a row; 0: as many as the plan says. Where it is a constant a lane has at most kEntries, in registers.
// The general code would grow too large, and reads the tile again each time.
template <class T, bool kGeneral, Pass kPass, int kLanes>
class Tiles : CrossEntropy<T, kGeneral, kPass> {
  using Base = CrossEntropy<T, kGeneral, kPass>;
  using Base::args_;
  using typename Base::Acc;
  using typename Base::Gradient;
  using Statistics = typename Base::Statistics;
  static_assert(kGeneral == (kLanes == 0));
  static constexpr int kEntries = kLanes == 1 ? kOneLaneClasses : kLanes == 0 ? 1 : kFewLanesClasses / kFewLanes;

 public:
  __device__ __forceinline__ Tiles(const CrossEntropyArgs& args, const TilePlan& plan, const Run& run)
      : Base(args, run), plan_(plan) {}

  __device__ __forceinline__ void process(const Run& run, T* memory) {
    // Two buffers take turns.
    Tile<T> logits{memory, plan_}, next{memory + plan_.elements(), plan_};
    if (blockIdx.x < plan_.tiles) copy_in(blockIdx.x, logits);
    __pipeline_commit();
    for (std::int64_t tile = blockIdx.x; tile < plan_.tiles; tile += gridDim.x) {
      if (tile + gridDim.x < plan_.tiles) copy_in(tile + gridDim.x, next);
      __pipeline_commit();
      __pipeline_wait_prior(1);
      __syncthreads();
      rows(tile, logits);
      __syncthreads();
      if constexpr (kPass != Pass::forward) {
        if (args_.grad_logits.data) copy_out(tile, logits);
        __syncthreads();
      }
      T* const done = logits.data;
      logits.data = next.data;
      next.data = done;
    }
    if constexpr (kPass != Pass::backward) {
      this->finish_waiting(sums_);
      add_up(run.grid, args_.total, blockIdx.x, sums_);
    }
  }

 private:
  __device__ __forceinline__ int lanes() const { return kLanes ? kLanes : plan_.lanes; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % lanes(); }
  __device__ __forceinline__ int row() const { return threadIdx.x / lanes(); }
  __device__ __forceinline__ std::int64_t first_row(std::int64_t tile) const { return tile * plan_.rows; }
  __device__ __forceinline__ int rows_of(std::int64_t tile) const {
    const std::int64_t left = args_.shape.positions() - first_row(tile);
    return left < plan_.rows ? static_cast<int>(left) : plan_.rows;
  }

  // --- Copies ---

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
    const Span<const T, int> from(logits + first_row(tile) * classes, count);
    if (plan_.pitch == classes) {
      for (int p = threadIdx.x; p < from.packets; p += blockDim.x) {
        __pipeline_memcpy_async(to.data + plan_.start + from.first(p), from.data + from.first(p), kPacketBytes);
      }
    } else {
      for (int p = threadIdx.x; p < from.packets; p += blockDim.x) {
        T* place = &to.flat(from.first(p), classes);
        for (int i = 0; i < from.kWidth; i += sizeof(Word) / sizeof(T)) {
          __pipeline_memcpy_async(place + i, from.data + from.first(p) + i, sizeof(Word));
        }
      }
    }
    if (threadIdx.x < from.singles) {
      const int e = from.single(threadIdx.x);
      to.flat(e, classes) = from.data[e];
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
    const Span<T, int> to(grad + first_row(tile) * classes, count);
    if (plan_.pitch == classes) {
      for (int p = threadIdx.x; p < to.packets; p += blockDim.x) {
        const uint4 words = *reinterpret_cast<const uint4*>(from.data + plan_.start + to.first(p));
        to.store(p, bits<Packet<T>>(words));
      }
    } else {
      for (int p = threadIdx.x; p < to.packets; p += blockDim.x) {
        const Word* place = reinterpret_cast<const Word*>(&from.flat(to.first(p), classes));
        const uint4 words{place[0], place[1], place[2], place[3]};
        to.store(p, bits<Packet<T>>(words));
      }
    }
    if (threadIdx.x < to.singles) {
      const int e = to.single(threadIdx.x);
      to.data[e] = from.flat(e, classes);
    }
  }

  // --- A row, or a lane's part of one ---

  // All lanes go round equally often: where the tile ends within a round, some have no row.
  __device__ __forceinline__ void rows(std::int64_t tile, const Tile<T>& logits) {
    const int count = rows_of(tile), step = kTileThreads / lanes();
    const std::int64_t first = first_row(tile);
    int r = row();
    std::int64_t index = r < count ? this->index_at(first + r) : 0;
    for (int round = 0; round < count; round += step, r += step) {
      Target<Acc> target = Base::no_target();
      if (r < count) target = this->target_of(index);
      if (r + step < count) index = this->index_at(first + r + step);
      const std::int64_t position = r < count ? first + r : -1;
      if constexpr (kGeneral) {
        row_in_memory(position, target, &logits.at(r, 0));
      } else {
        row_in_registers(position, target, &logits.at(r, 0));
      }
    }
  }

  // Calls body(k, c) for the entries of this lane, some at a time; the last of them may not exist.
  template <class Body>
  __device__ __forceinline__ void for_each_entry(Body body) const {
    constexpr int kGroup = 4;
#pragma unroll
    for (int k = 0; k < kEntries; k += kGroup) {
      if (k * kLanes >= this->classes()) break;
#pragma unroll
      for (int i = k; i < k + kGroup; ++i) body(i, i * kLanes + lane());
    }
  }

  __device__ __forceinline__ void row_in_registers(std::int64_t position, const Target<Acc>& target, T* logits) {
    // A row that is skipped has no entries: its exponentials are zeros, and so is its gradient.
    const int classes = target.skip ? 0 : this->classes();
    Acc e[kEntries];  // the logits, then their exponentials
    const Acc target_logit = target.index < 0 ? Acc(0) : convert<Acc>(logits[target.index]);
    Statistics statistics;
    for_each_entry([&](int k, int c) {
      e[k] = c < classes ? convert<Acc>(logits[c]) : -math::kInfinity<Acc>;
      statistics.max = math::max_ignoring_nan(e[k], statistics.max);
    });
    Gradient gradient{};
    if constexpr (kPass == Pass::backward) {
      if (!target.skip) gradient = this->saved_gradient(position, target, Acc(0));
    } else {
      statistics.max = group_max(statistics.max, kLanes);
    }
    const Acc shift = kPass == Pass::backward ? gradient.shift : math::finite_shift(statistics.max);
    for_each_entry([&](int k, int) { statistics.sum += e[k] = Base::exp(e[k] - shift); });
    if constexpr (kPass != Pass::backward) {
      statistics.sum = group_sum(statistics.sum, kLanes);
      this->finish_later(position, target, statistics, target_logit, lane(), kLanes, sums_);
    }
    if constexpr (kPass == Pass::forward) return;

    if constexpr (kPass == Pass::forward_with_gradient) {
      if (!target.skip) gradient = this->gradient(position, target, statistics);
    }
    __syncwarp();  // all lanes have read the target's logit, whose place the gradient takes
    for_each_entry([&](int k, int c) {
      if (c < this->classes()) logits[c] = convert<T>(math::logit_grad(e[k], gradient.factor, Acc(0)));
    });
    // The target's entry once more, with its mass: by the lane that has just written it.
    if (target.index >= 0 && target.index % kLanes == lane()) {
      const Acc target_e = Base::exp(target_logit - shift);
      logits[target.index] = convert<T>(math::logit_grad(target_e, gradient.factor, gradient.on_target));
    }
  }

  __device__ __forceinline__ void row_in_memory(std::int64_t position, const Target<Acc>& target, T* logits) {
    constexpr int kGroup = 4;
    const int classes = this->classes();
    const Acc target_logit = target.index < 0 ? Acc(0) : this->value(convert<Acc>(logits[target.index]));
    Statistics statistics;
    if (!target.skip && (kPass != Pass::backward || this->problem_.probabilities)) {
#pragma unroll 1
      for (int first = lane(); first < classes; first += kGroup * lanes()) {
        Acc x[kGroup];
        const auto class_of = [&](int i) { return first + i * lanes() < classes ? first + i * lanes() : -1; };
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          x[i] = class_of(i) < 0 ? -math::kInfinity<Acc> : convert<Acc>(logits[class_of(i)]);
        }
        this->add(statistics, position, x, class_of);
      }
    }
    this->merge_lanes(statistics, lanes());
    Gradient gradient{};
    if constexpr (kPass == Pass::backward) {
      if (!target.skip) gradient = this->saved_gradient(position, target, this->mass_of(statistics));
    } else {
      if (position >= 0 && lane() == 0) this->store_argmax(position, statistics);
      this->finish_later(position, target, statistics, target_logit, lane(), lanes(), sums_);
      if (kPass == Pass::forward_with_gradient && !target.skip) gradient = this->gradient(position, target, statistics);
    }
    if constexpr (kPass != Pass::forward) {
      __syncwarp();  // all lanes have read the target's logit, whose place the gradient takes
      if (position < 0) return;
      const bool no_gradient = Base::has_no_gradient(target);
#pragma unroll 1
      for (int c = lane(); c < classes; c += lanes()) {
        const Acc x = convert<Acc>(logits[c]);
        if (kPass == Pass::backward && args_.grad_probabilities.data) {
          this->store_probability_gradient(gradient, position, target.skip ? Acc(0) : this->value(x), c);
        }
        logits[c] = convert<T>(no_gradient ? Acc(0) : this->entry_gradient(gradient, position, x, c));
      }
    }
  }

  const TilePlan& plan_;
  Sums sums_;
};

// Blocks that registers must leave room for: more where a lane has fewer of its entries in them.
template <class T, bool kGeneral, Pass kPass, int kLanes>
inline constexpr int kTileBlocks = kGeneral                                             ? sizeof(T) > 4 ? 2 : 4
                                   : kPass == Pass::forward_with_gradient && kLanes > 1 ? 2
                                                                                        : 3;

template <class T, bool kGeneral, Pass kPass, int kLanes>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T, kGeneral, kPass, kLanes>)
    cross_entropy_tiles(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ TilePlan plan,
                        const __grid_constant__ Run run) {
  extern __shared__ __align__(16) unsigned char memory[];
  Tiles<T, kGeneral, kPass, kLanes>(args, plan, run).process(run, reinterpret_cast<T*>(memory));
}

}  // namespace fusedloss::cuda
