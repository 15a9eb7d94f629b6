// What the three traversals of cross entropy share: targets, the mean's divisor, and the loss and gradient of a row
// from its sums. The formulas are those of csrc/math/cross_entropy.h, as on the CPU.

#pragma once

#include "../../math/cross_entropy.h"
#include "class_loss.cuh"
#include "cuda.h"
#include "device.h"
#include "row_sums.cuh"

namespace fusedloss::cuda {

// Up to this many positions every block counts the mean's divisor for itself: a few microseconds, less than another
// launch. Beyond, a launch of its own counts them.
inline constexpr std::int64_t kCountedInline = 4096;

// What a launch adds to the arguments.
struct Run {
  GridSums grid;
  const double* divisor = nullptr;  // of the mean; null: a block that needs it counts for itself
};

template <class Acc>
struct Target {
  int index;   // -1: no class
  bool counts; // contributes to the loss
  bool skip;   // contributes to nothing that is asked for
  Acc mass;    // on the target class alone
};

// kGeneral: entries need more than their logit: smoothing, probabilities or a soft cap.
template <class T, bool kGeneral, Pass kPass>
class CrossEntropy {
 public:
  using Acc = Accumulate<T>;
  using Sums_ = RowSums<Acc, kGeneral>;

  // What an entry's gradient is made of, for one row.
  struct Gradient {
    Acc shift;      // subtracted from the logits
    Acc factor;     // of exp(x - shift)
    Acc on_target;  // grad_loss times the mass on the target class alone
    Acc on_all;     // grad_loss, times the smoothing; for the masses that every class has
    int target;
  };

  // To be called by all threads of the block.
  __device__ __forceinline__ CrossEntropy(const CrossEntropyArgs& args, const Run& run)
      : args_(args),
        classes_(static_cast<int>(args.shape.classes)),
        weight_(static_cast<const Acc*>(args.weight)),
        smoothing_{static_cast<Acc>(1 - args.label_smoothing),
                   static_cast<Acc>(args.label_smoothing / static_cast<double>(args.shape.classes))},
        z_loss_(static_cast<Acc>(args.z_loss)) {
    if constexpr (kGeneral) {
      if (!args.has_probabilities && args.label_smoothing != 0) {
        double weights = classes_;
        if (weight_) {
          Sums sums;
          for (int c = threadIdx.x; c < classes_; c += blockDim.x) sums.loss += static_cast<double>(weight_[c]);
          weights = block_sum_for_all(sums).loss;
        }
        spread_mass_ = static_cast<Acc>(static_cast<double>(smoothing_.spread) * weights);
      }
    }
    if constexpr (kPass == Pass::backward) {
      scale_ = math::mean_scale(args.flow.divisor);
    } else if constexpr (kPass == Pass::forward_with_gradient) {
      if (args.total.reduction == Reduction::mean) {
        const double divisor = run.divisor ? *run.divisor : counted_divisor();
        scale_ = math::mean_scale(&divisor);
      }
    }
  }

  __device__ __forceinline__ int classes() const { return classes_; }

  __device__ __forceinline__ Target<Acc> target(std::int64_t position) const {
    if constexpr (kGeneral) {
      if (args_.has_probabilities) return {-1, true, false, Acc(0)};
    }
    const int index = class_of(args_.target, position, classes_);
    const bool counts = index >= 0;
    const Acc weight = counts && weight_ ? weight_[index] : Acc(1);
    const bool lse_is_wanted = kPass == Pass::backward ? args_.grad_lse != nullptr : args_.every_lse;
    return {index, counts, !counts && !lse_is_wanted, counts ? smoothing_.keep * weight : Acc(0)};
  }

  // --- Entries ---

  __device__ __forceinline__ bool capped() const { return kGeneral && args_.logit_softcap != 0; }
  __device__ __forceinline__ bool dense() const {
    return kGeneral && (args_.has_probabilities || args_.label_smoothing != 0);
  }

  __device__ __forceinline__ Acc value(Acc x) const {
    return capped() ? math::soft_cap(x, static_cast<Acc>(args_.logit_softcap)).value : x;
  }

  __device__ __forceinline__ Acc class_weight(int c) const { return weight_ ? weight_[c] : Acc(1); }

  // The mass that every class has: a class's weight, which the smoothing multiplies later, or that of a probability.
  __device__ __forceinline__ Acc mass(std::int64_t position, int c) const {
    if (!args_.has_probabilities) return class_weight(c);
    const ClassTensor& q = args_.probabilities;
    const std::int64_t at = offset_of(args_.shape, q, position) + c * q.class_stride;
    return math::probability_mass(smoothing_, load_floating<Acc>(q.data, q.dtype, at), class_weight(c));
  }

  // Adds kCount entries to a row's sums, with one rescaling for all of them. class_at(i): the class of entry i, or -1
  // where there is none; such an entry is -inf, and has no part in the dense sum: no mass times infinity is NaN.
  template <int kCount, class Classes>
  __device__ __forceinline__ void add(Sums_& row, std::int64_t position, const Acc (&x)[kCount],
                                      Classes class_at) const {
    Acc max = row.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) max = math::larger(x[i], max);
    const Acc shift = math::finite_shift(max);
    Acc sum = Acc(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += math::exp_difference(x[i] - shift);
    if constexpr (kGeneral) {
      if (dense()) {
        Sums_ part;
        part.max = max;
        part.sum = sum;
        for (int i = 0; i < kCount; ++i) {
          const int c = class_at(i);
          if (c < 0) continue;
          const Acc mass = this->mass(position, c);
          part.dense_loss += math::entry_loss_at_max(x[i] - shift, mass);
          part.mass += mass;
        }
        row.merge(part);
        return;
      }
    }
    row.sum = math::rescale(row.sum, row.max, max) + sum;
    row.max = max;
  }

  __device__ __forceinline__ Acc entry_gradient(const Gradient& row, std::int64_t position, Acc x, int c) const {
    if constexpr (kGeneral) {
      math::SoftCap<Acc> entry{x, Acc(1)};
      if (capped()) entry = math::soft_cap(x, static_cast<Acc>(args_.logit_softcap));
      const Acc all = dense() ? row.on_all * mass(position, c) : Acc(0);
      const Acc on_class = c == row.target ? all + row.on_target : all;
      return math::logit_grad(math::exp_difference(entry.value - row.shift), row.factor, on_class) * entry.slope;
    } else {
      const Acc on_class = c == row.target ? row.on_target : Acc(0);
      return math::logit_grad(math::exp_difference(x - row.shift), row.factor, on_class);
    }
  }

  // --- Rows ---

  // The loss of a finished row, whose target class has the (capped) logit target_logit; writes what is wanted of it.
  // By one thread of those that share the row.
  __device__ __forceinline__ void finish_row(std::int64_t position, const Target<Acc>& target, const Sums_& row,
                                             Acc target_logit, Sums& sums) const {
    const Acc log_sum = math::log(row.sum), max = row.max;
    Acc loss = math::entry_loss(target.index < 0 ? Acc(0) : target_logit - max, log_sum, target.mass);
    if constexpr (kGeneral) {
      if (args_.has_probabilities) {
        loss += row.dense_loss + row.mass * log_sum;
      } else if (dense()) {
        loss += smoothing_.spread * row.dense_loss + spread_mass_ * log_sum;
      }
    }
    if (z_loss_ != Acc(0)) loss += math::z_term(math::log_sum_exp(max, log_sum), z_loss_);
    loss = math::zero_if(!target.counts || classes_ == 0, loss);
    if (args_.loss.data) store(args_.loss.data, args_.loss.dtype, position, loss);
    if (args_.row_max) {
      static_cast<Acc*>(args_.row_max)[position] = max;
      static_cast<Acc*>(args_.row_log_sum)[position] = log_sum;
    }
    if (args_.lse) static_cast<Acc*>(args_.lse)[position] = math::log_sum_exp(max, log_sum);
    sums.loss += static_cast<double>(loss);
    if (target.counts && classes_ > 0) {
      const bool weighted = weight_ && !args_.has_probabilities;
      sums.divisor += weighted ? static_cast<double>(weight_[target.index]) : 1;
    }
  }

  // From a finished row's sums.
  __device__ __forceinline__ Gradient gradient(std::int64_t position, const Target<Acc>& target,
                                               const Sums_& row) const {
    const Acc inverse = Acc(1) / row.sum;
    Acc mass = target.mass + spread_mass_;
    if constexpr (kGeneral) mass = args_.has_probabilities ? row.mass : mass;
    return gradient(position, target, row.max, math::finite_shift(row.max), inverse, mass, Acc(0), [&] {
      return math::log(row.sum);
    });
  }

  // From the statistics that forward has saved; mass: that of probabilities.
  __device__ __forceinline__ Gradient saved_gradient(std::int64_t position, const Target<Acc>& target,
                                                     Acc probability_mass) const {
    const Acc max = static_cast<const Acc*>(args_.row_max)[position];
    const Acc log_sum = static_cast<const Acc*>(args_.row_log_sum)[position];
    // log(sum) of no less than 0 is the rule; all logits -inf or an infinite one give -inf and NaN.
    const Acc inverse = log_sum >= Acc(0) ? math::exp_nonpositive(-log_sum) : log_sum - log_sum;
    const Acc grad_lse = args_.grad_lse ? static_cast<const Acc*>(args_.grad_lse)[position] : Acc(0);
    const Acc mass = args_.has_probabilities ? probability_mass : target.mass + spread_mass_;
    return gradient(position, target, max, max, inverse, mass, grad_lse, [&] { return log_sum; });
  }

  // To a probability q_c, whose (capped) logit is x.
  __device__ __forceinline__ void store_probability_gradient(const Gradient& row, std::int64_t position, Acc x,
                                                             int c) const {
    const ClassTensor& tensor = args_.grad_probabilities;
    const Acc max = static_cast<const Acc*>(args_.row_max)[position];
    const Acc log_sum = static_cast<const Acc*>(args_.row_log_sum)[position];
    const Acc grad = math::probability_grad(x - max, log_sum, row.on_all, smoothing_.keep, class_weight(c));
    store(tensor.data, tensor.dtype, offset_of(args_.shape, tensor, position) + c * tensor.class_stride, grad);
  }

 protected:
  const CrossEntropyArgs& args_;

 private:
  __device__ __forceinline__ double counted_divisor() const {
    if (args_.has_probabilities) return classes_ > 0 ? static_cast<double>(args_.shape.positions()) : 0;
    Sums sums;
    sums.divisor = count(args_.target, args_.shape, weight_, threadIdx.x, blockDim.x);
    return block_sum_for_all(sums).divisor;
  }

  template <class LogSum>
  __device__ __forceinline__ Gradient gradient(std::int64_t position, const Target<Acc>& target, Acc max, Acc shift,
                                               Acc inverse, Acc mass, Acc grad_lse, LogSum log_sum) const {
    const PositionTensor& grad_loss = args_.flow.grad_loss;
    double flow = scale_;
    if (grad_loss.data) flow *= load_floating<double>(grad_loss.data, grad_loss.dtype, position * grad_loss.stride);
    const Acc g = target.counts ? static_cast<Acc>(flow) : Acc(0);
    const Acc lse = z_loss_ == Acc(0) ? Acc(0) : math::log_sum_exp(max, log_sum());
    const Acc factor = math::normaliser_grad(g, grad_lse, target.counts ? mass : Acc(0), lse, z_loss_) * inverse;
    return {shift, factor, g * target.mass, args_.has_probabilities ? g : g * smoothing_.spread, target.index};
  }

  const int classes_;
  const Acc* weight_;
  const math::Smoothing<Acc> smoothing_;
  const Acc z_loss_;
  Acc spread_mass_ = Acc(0);  // the mass that smoothing spreads over all classes
  double scale_ = 1;          // of grad_loss
};

}  // namespace fusedloss::cuda
