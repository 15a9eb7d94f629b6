// Cross entropy where positions lie side by side, or with any other strides: a thread for a few positions.
//
// A thread reads a packet of neighbouring positions for each class, several classes at a time, and has one running sum
// for each position. Where forward writes the gradient too, all packets of a thread are on their way to shared memory
// at once, and stay there until the gradient takes their place; where they do not fit they are read a second time. With
// strides that allow no packets, and where entries need more than their logit, a packet holds one position.

#pragma once

#include <cuda_pipeline.h>

#include "cross_entropy.cuh"

namespace fusedloss::cuda {

inline constexpr int kClassesInFlight = 4;

template <class T, bool kGeneral, Pass kPass, int kWidth>
class Columns : CrossEntropy<T, kGeneral, kPass> {
  using Base = CrossEntropy<T, kGeneral, kPass>;
  using Base::args_;
  using typename Base::Acc;
  using Statistics = typename Base::Statistics;

 public:
  __device__ __forceinline__ Columns(const CrossEntropyArgs& args, const ColumnPlan& plan, const Run& run,
                                     Packet<T, kWidth>* kept)
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
    Statistics rows[kWidth];
    Acc target_logits[kWidth];
    bool all_skipped = true;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      targets[i] = this->target(first + i);
      target_logits[i] = Acc(0);
      all_skipped = all_skipped && targets[i].skip;
    }
    const bool by_probabilities = this->problem_.probabilities;
    if (keeps() && !all_skipped) keep(logits);
    if ((kPass != Pass::backward || by_probabilities) && !all_skipped) {
      add_classes(first, logits, targets, rows, target_logits);
    }
    if constexpr (kPass != Pass::backward) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) this->finish_row(first + i, targets[i], rows[i], target_logits[i], sums);
    }
    if constexpr (kPass != Pass::forward) {
      typename Base::Gradient gradients[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        gradients[i] = {};
        if (targets[i].skip) continue;
        if constexpr (kPass == Pass::backward) {
          gradients[i] = this->saved_gradient(first + i, targets[i], this->mass_of(rows[i]));
        } else {
          gradients[i] = this->gradient(first + i, targets[i], rows[i]);
        }
      }
      store_gradients(first, logits, targets, gradients, all_skipped);
    }
  }

  __device__ __forceinline__ void add_classes(std::int64_t first, const T* logits, const Target<Acc> (&targets)[kWidth],
                                              Statistics (&rows)[kWidth], Acc (&target_logits)[kWidth]) const {
    const int classes = this->classes();
    for (int c = 0; c < classes; c += kClassesInFlight) {
      Packet<T, kWidth> packets[kClassesInFlight];
#pragma unroll
      for (int u = 0; u < kClassesInFlight; ++u) {
        if (c + u < classes) packets[u] = of_class(logits, c + u);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        Acc x[kClassesInFlight];
#pragma unroll
        for (int u = 0; u < kClassesInFlight; ++u) {
          x[u] = c + u < classes ? this->value(convert<Acc>(packets[u].values[i])) : -math::kInfinity<Acc>;
          if (c + u == targets[i].index) target_logits[i] = x[u];
        }
        this->add(rows[i], first + i, x, [&](int u) { return c + u < classes ? c + u : -1; });
      }
    }
  }

  __device__ __forceinline__ bool keeps() const { return kPass == Pass::forward_with_gradient && plan_.keeps; }
  __device__ __forceinline__ Packet<T, kWidth>& kept(int c) const { return kept_[c * blockDim.x + threadIdx.x]; }

  // No thread reads what another has kept, so that waiting for one's own copies is enough.
  __device__ __forceinline__ void keep(const T* logits) const {
    for (int c = 0; c < this->classes(); ++c) {
      const T* from = logits + c * args_.logits.class_stride;
      if constexpr (sizeof(Packet<T, kWidth>) >= 4) {
        __pipeline_memcpy_async(&kept(c), from, sizeof(Packet<T, kWidth>));
      } else {
        kept(c) = load_streaming<kWidth>(from);
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }

  __device__ __forceinline__ Packet<T, kWidth> of_class(const T* logits, int c) const {
    return keeps() ? kept(c) : load_streaming<kWidth>(logits + c * args_.logits.class_stride);
  }

  __device__ __forceinline__ void store_gradients(std::int64_t first, const T* logits,
                                                  const Target<Acc> (&targets)[kWidth],
                                                  const typename Base::Gradient (&gradients)[kWidth],
                                                  bool all_skipped) const {
    const ClassTensor& tensor = args_.grad_logits;
    T* grad = static_cast<T*>(tensor.data) + offset_of(args_.shape, tensor, first);
#pragma unroll 4
    for (int c = 0; c < this->classes(); ++c) {
      Packet<T, kWidth> packet{};
      if (!all_skipped) packet = of_class(logits, c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Acc x = convert<Acc>(packet.values[i]);
        if constexpr (kPass == Pass::backward && kGeneral) {
          if (args_.grad_probabilities.data) {
            this->store_probability_gradient(gradients[i], first + i, this->value(x), c);
          }
        }
        const Acc entry = targets[i].skip ? Acc(0) : this->entry_gradient(gradients[i], first + i, x, c);
        packet.values[i] = convert<T>(entry);
      }
      if (tensor.data) store_streaming(grad + c * tensor.class_stride, packet);
    }
  }

  const ColumnPlan& plan_;
  Packet<T, kWidth>* kept_;
};

template <class T, bool kGeneral, Pass kPass, int kWidth>
__global__ void __launch_bounds__(kColumnThreads)
    cross_entropy_columns(const __grid_constant__ CrossEntropyArgs args, const __grid_constant__ ColumnPlan plan,
                          const __grid_constant__ Run run) {
  extern __shared__ __align__(16) unsigned char memory[];
  Columns<T, kGeneral, kPass, kWidth>(args, plan, run, reinterpret_cast<Packet<T, kWidth>*>(memory)).process(run);
}

}  // namespace fusedloss::cuda
