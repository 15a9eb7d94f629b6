// Cross entropy where positions lie side by side, or with any other strides: a thread for a few positions.
//
// A thread has the packets of its neighbouring positions, one for each class. It copies all of them to shared memory at
// once, and goes over them there: for the largest logits, for the sums, and for the gradients, which take the logits'
// place until they leave. No thread reads what another has kept. Packets that do not fit stay where they are: running
// sums are added up over several classes at a time, and the gradients' logits are read again. Strides that allow no
// packets, and entries that need more than their logit, make it packets of one position.

#pragma once

#include <cuda_pipeline.h>

#include "cross_entropy.cuh"

namespace fusedloss::cuda {

template <class T, bool kGeneral, Pass kPass, int kWidth>
class Columns : CrossEntropy<T, kGeneral, kPass> {
  using Base = CrossEntropy<T, kGeneral, kPass>;
  using Base::args_;
  using typename Base::Acc;
  using typename Base::Gradient;
  using Statistics = typename Base::Statistics;
  using Packet = cuda::Packet<T, kWidth>;

  static constexpr int kClassesInFlight = kGeneral ? 4 : 8;
  static constexpr int kUnrolled = kWidth > 2 ? 2 : 4;  // classes, where each takes a dozen instructions a position

 public:
  __device__ __forceinline__ Columns(const CrossEntropyArgs& args, const ColumnPlan& plan, const Run& run, Packet* kept)
      : Base(args, run), plan_(plan), kept_(kept) {}

  __device__ __forceinline__ void process(const Run& run) const {
    const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
    Sums sums;
    for (std::int64_t item = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < plan_.items; item += step) {
      positions(item * kWidth, sums);
    }
    if constexpr (kPass != Pass::backward) add_up(run.grid, args_.total, blockIdx.x, sums);
  }

 private:
  __device__ __forceinline__ void positions(std::int64_t first, Sums& sums) const {
    const T* logits = static_cast<const T*>(args_.logits.data) + offset_of(args_.shape, args_.logits, first);
    Target<Acc> targets[kWidth];
    const int skipped = load_targets(first, targets);
    const bool all_skipped = skipped == kWidth;
    Statistics rows[kWidth];
    if (!all_skipped) {
      if (keeps()) {
        keep(logits);
        if (skipped > 0) clear_skipped(targets);
      }
      if (kPass != Pass::backward || this->problem_.probabilities) {
        if (kInPlace && keeps()) {
          add_kept(rows);
        } else {
          add_classes(first, logits, rows);
        }
      }
    }
    Gradient gradients[kWidth];
    Acc on_targets[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Target<Acc>& target = targets[i];
      const Acc logit = target.index < 0 ? Acc(0) : convert<Acc>(element(logits, target.index, i));
      if constexpr (kPass != Pass::backward) {
        this->store_argmax(first + i, rows[i]);
        this->finish_row(first + i, target, rows[i], this->value(logit), sums);
      }
      if constexpr (kPass != Pass::forward) {
        gradients[i] = {};
        if (!target.skip) {
          gradients[i] = kPass == Pass::backward ? this->saved_gradient(first + i, target, this->mass_of(rows[i]))
                                                 : this->gradient(first + i, target, rows[i]);
        }
        on_targets[i] = Acc(0);
        if (kInPlace && target.index >= 0) {
          on_targets[i] = this->entry_gradient(gradients[i], first + i, logit, target.index);
        }
      }
    }
    if constexpr (kPass != Pass::forward) {
      T* grad = static_cast<T*>(args_.grad_logits.data) + offset_of(args_.shape, args_.grad_logits, first);
      if (all_skipped) {
        store(grad, [](int) { return Packet::filled(convert<T>(Acc(0))); });
      } else if (kInPlace && keeps()) {
        gradients_in_place(targets, gradients, on_targets);
        store(grad, [&](int c) { return kept(c); });
      } else {
        store_gradients(first, logits, targets, gradients, grad);
      }
    }
  }

  // Returns of how many nothing is to be known.
  __device__ __forceinline__ int load_targets(std::int64_t first, Target<Acc> (&targets)[kWidth]) const {
    std::int64_t indices[kWidth] = {};
    if (!this->problem_.probabilities) load_indices(args_.target.index, first, indices);
    int skipped = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      targets[i] = this->target_of(indices[i]);
      skipped += targets[i].skip;
    }
    return skipped;
  }

  // --- Kept packets ---

  // Packets of 16 bytes are planned only where they are kept: running sums of so many positions would take more
  // registers than all else.
  __device__ __forceinline__ bool keeps() const { return sizeof(Packet) == kPacketBytes || plan_.keeps; }
  __device__ __forceinline__ Packet& kept(int c) const { return kept_[c * blockDim.x + threadIdx.x]; }
  __device__ __forceinline__ T& kept(int c, int i) const { return reinterpret_cast<T*>(&kept(c))[i]; }

  // A thread waits for its own copies alone.
  __device__ __forceinline__ void keep(const T* logits) const {
    if constexpr (sizeof(Packet) >= 4) {
#pragma unroll 4
      for (int c = 0; c < this->classes(); ++c) {
        __pipeline_memcpy_async(&kept(c), logits, sizeof(Packet));
        logits += args_.logits.class_stride;
      }
      __pipeline_commit();
      __pipeline_wait_prior(0);
    } else {
      for (int c = 0; c < this->classes(); c += kClassesInFlight) {
        Packet packets[kClassesInFlight];
        load_classes(c, packets, [&](int c) { return from_memory(logits, c); });
#pragma unroll
        for (int u = 0; u < kClassesInFlight; ++u) {
          if (c + u < this->classes()) kept(c + u) = packets[u];
        }
      }
    }
  }

  // An ignored position among others reads as zeros from here on: its logits may be anything, and its gradient is zero.
  __device__ __forceinline__ void clear_skipped(const Target<Acc> (&targets)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (!targets[i].skip) continue;
#pragma unroll 1
      for (int c = 0; c < this->classes(); ++c) kept(c, i) = convert<T>(Acc(0));
    }
  }

  __device__ __forceinline__ void add_kept(Statistics (&rows)[kWidth]) const {
    Packet largest = Packet::filled(convert<T>(-math::kInfinity<Acc>));
#pragma unroll 4
    for (int c = 0; c < this->classes(); ++c) largest = largest.max(kept(c));
    Acc max[kWidth], shift[kWidth];
    largest.unpack(max);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      rows[i].max = max[i];
      shift[i] = math::finite_shift(max[i]);
    }
#pragma unroll kUnrolled
    for (int c = 0; c < this->classes(); ++c) {
      Acc x[kWidth];
      kept(c).unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) rows[i].sum += Base::exp(x[i] - shift[i]);
    }
  }

  // As if there were no targets, whose entries are then put right.
  __device__ __forceinline__ void gradients_in_place(const Target<Acc> (&targets)[kWidth],
                                                     const Gradient (&gradients)[kWidth],
                                                     const Acc (&on_targets)[kWidth]) const {
#pragma unroll kUnrolled
    for (int c = 0; c < this->classes(); ++c) {
      Acc x[kWidth];
      kept(c).unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = Base::other_entry_gradient(gradients[i], x[i]);
      kept(c) = Packet::pack(x);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (targets[i].index >= 0) kept(targets[i].index, i) = convert<T>(on_targets[i]);
    }
  }

  // --- Packets from anywhere ---

  __device__ __forceinline__ Packet from_memory(const T* logits, int c) const {
    return load_streaming<kWidth>(logits + c * args_.logits.class_stride);
  }
  __device__ __forceinline__ Packet of_class(const T* logits, int c) const {
    return !kInPlace && keeps() ? kept(c) : from_memory(logits, c);
  }
  __device__ __forceinline__ T element(const T* logits, int c, int i) const {
    return keeps() ? kept(c, i) : logits[c * args_.logits.class_stride + i];
  }

  // All are asked for before the first is waited for.
  template <class PacketOf>
  __device__ __forceinline__ void load_classes(int c, Packet (&packets)[kClassesInFlight], PacketOf packet_of) const {
#pragma unroll
    for (int u = 0; u < kClassesInFlight; ++u) {
      if (c + u < this->classes()) packets[u] = packet_of(c + u);
    }
  }

  __device__ __forceinline__ void add_classes(std::int64_t first, const T* logits, Statistics (&rows)[kWidth]) const {
    const int classes = this->classes();
    for (int c = 0; c < classes; c += kClassesInFlight) {
      Packet packets[kClassesInFlight];
      load_classes(c, packets, [&](int c) { return of_class(logits, c); });
      Acc x[kWidth][kClassesInFlight];
#pragma unroll
      for (int u = 0; u < kClassesInFlight; ++u) {
        Acc logits_of_class[kWidth];
        packets[u].unpack(logits_of_class);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          x[i][u] = c + u < classes ? logits_of_class[i] : -math::kInfinity<Acc>;
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        this->add(rows[i], first + i, x[i], [&](int u) { return c + u < classes ? c + u : -1; });
      }
    }
  }

  __device__ __forceinline__ void store_gradients(std::int64_t first, const T* logits,
                                                  const Target<Acc> (&targets)[kWidth],
                                                  const Gradient (&gradients)[kWidth], T* grad) const {
    store(grad, [&](int c) {
      Acc x[kWidth];
      of_class(logits, c).unpack(x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if constexpr (kPass == Pass::backward && kGeneral) {
          if (args_.grad_probabilities.data) {
            this->store_probability_gradient(gradients[i], first + i, this->value(x[i]), c);
          }
        }
        x[i] = Base::has_no_gradient(targets[i]) ? Acc(0) : this->entry_gradient(gradients[i], first + i, x[i], c);
      }
      return Packet::pack(x);
    });
  }

  // packet_of(c): of a class's gradients. Only those to probabilities may be wanted.
  template <class PacketOf>
  __device__ __forceinline__ void store(T* grad, PacketOf packet_of) const {
    const bool wanted = !kGeneral || args_.grad_logits.data;
#pragma unroll 4
    for (int c = 0; c < this->classes(); ++c) {
      const Packet packet = packet_of(c);
      if (wanted) store_streaming(grad, packet);
      grad += args_.grad_logits.class_stride;
    }
  }

  static constexpr bool kInPlace = !kGeneral;  // an entry needs no more than its logit and its column

  const ColumnPlan& plan_;
  Packet* kept_;
};

// Blocks that registers must leave room for: as many as shared memory does at 19 classes.
template <class T, bool kGeneral, int kWidth>
inline constexpr int kColumnBlocks = kGeneral                             ? 1
                                     : kWidth * sizeof(T) == kPacketBytes ? 5
                                                                          : 8;

template <class T, bool kGeneral, Pass kPass, int kWidth>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks<T, kGeneral, kWidth>)
    cross_entropy_columns(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ ColumnPlan plan,
                          const __grid_constant__ Run run) {
  extern __shared__ __align__(16) unsigned char memory[];
  Columns<T, kGeneral, kPass, kWidth>(args, plan, run, reinterpret_cast<Packet<T, kWidth>*>(memory)).process(run);
}

}  // namespace fusedloss::cuda
