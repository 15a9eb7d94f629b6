// What the three traversals of cross entropy share: targets, the mean's divisor, and the phases of a row around the
// formulas of csrc/math/cross_entropy.h: its statistics, their merge, its finish and its gradient.

#pragma once

#include "../../math/cross_entropy.h"
#include "class_loss.cuh"
#include "plan.h"
#include "reduce.cuh"

namespace fusedloss::cuda {

// What a launch adds to the arguments.
struct Run {
  GridSums grid;
  const double* divisor = nullptr;  // of the mean; null: a block that needs it counts for itself
};

template <class Acc>
struct Target {
  int index;    // -1: none of these classes
  bool counts;  // contributes to the loss
  bool skip;    // contributes to nothing that is asked for
  Acc mass;     // on the target class alone
};

// The largest logit so far, and its class: of several the first; NaN is larger than any number. Of no logits, and of
// -inf only, it is class 0.
template <class Acc>
struct Largest {
  Acc value = -math::kInfinity<Acc>;
  int c = 0;

  __device__ __forceinline__ void look(Acc x, int at) {
    const bool is_before = at < c;
    if (x > value || (x == value && is_before) || (x != x && (value == value || is_before))) {
      value = x;
      c = at;
    }
  }
};

// What is known of a part of a row. Where its entropy may be wanted the sums are float64: an entropy is hardly more
// than what they have beside 1. kDense: every class may have mass.
template <class Acc, bool kDense, bool kEntropy>
struct PartStatistics : math::RowStatistics<Acc, true, std::conditional_t<kEntropy, double, Acc>> {
  using Base = math::RowStatistics<Acc, true, std::conditional_t<kEntropy, double, Acc>>;

  Largest<Acc> largest;  // where its class is wanted

  __device__ __forceinline__ void raise(Acc larger_max) {
    Base::raise(larger_max);
    forget();
  }
  __device__ __forceinline__ void merge(const PartStatistics& other) {
    Base::merge(other);
    forget();
    largest.look(other.largest.value, other.largest.c);
  }

 private:
  // What nobody adds to, the compiler need not carry along.
  __device__ __forceinline__ void forget() {
    if constexpr (!kEntropy) this->gap = 0;
    if constexpr (!kDense) this->dense_loss = this->mass = 0;
  }
};

template <class Acc>
struct PartStatistics<Acc, false, false> : math::RowStatistics<Acc, false> {};

// kGeneral: entries need more than their logit, or are wanted for more than their exponentials' sum: Problem::general
// in plan.cpp has the list.
// kAnswers: the entropy may be wanted, or the class of the largest logit.
// kParts: the classes may be some of many. A gradient in forward is never of those.
template <class T, bool kGeneral, Pass kPass, bool kAnswers = kGeneral, bool kParts = kGeneral>
class CrossEntropy {
  static constexpr bool kOfMany = kParts && kPass != Pass::forward_with_gradient;

 public:
  using Acc = Accumulate<T>;
  using Statistics = PartStatistics<Acc, kGeneral, kAnswers && kPass == Pass::forward>;

  // What the entries of a row share in their gradients; the factor is divided by the sum of exp(x - shift).
  struct Gradient : math::RowGradient<Acc> {
    Acc shift;
    int target;
  };

  // To be called by all threads of the block.
  __device__ __forceinline__ CrossEntropy(const CrossEntropyArgs& args, const Run& run)
      : args_(args),
        classes_(static_cast<int>(args.shape.classes)),
        weight_(static_cast<const Acc*>(args.weight)),
        problem_(math::index_problem<Acc>(args)),
        stores_rows_(args.loss.data || args.row_max || args.lse || (kAnswers && args.entropy)) {
    if constexpr (kGeneral) {
      double weight_sum = classes_;
      if (weight_ && args.label_smoothing != 0 && !args.has_probabilities) {
        Sums sums;
        for (int c = threadIdx.x; c < classes_; c += blockDim.x) sums.loss += static_cast<double>(weight_[c]);
        weight_sum = block_sum_for_all(sums).loss;
      }
      const std::int64_t classes = kOfMany ? args.class_count() : classes_;
      problem_ = math::row_problem<Acc>(args, args.has_probabilities, classes, weight_sum);
    }
    if constexpr (kPass == Pass::backward) {
      scale_ = math::mean_scale(args.grad_divisor);
    } else if constexpr (kPass == Pass::forward_with_gradient) {
      if (args.total.reduction == Reduction::mean) {
        const double* const known = args.total.denominator ? args.total.denominator : run.divisor;
        const double divisor = known ? *known : counted_divisor();
        scale_ = math::mean_scale(&divisor);
      }
    }
  }

  __device__ __forceinline__ int classes() const { return classes_; }

  // A position's class index, loaded and not looked at; with probabilities there is none.
  __device__ __forceinline__ std::int64_t index_at(std::int64_t position) const {
    return problem_.probabilities ? 0 : cuda::index_at(args_.target.index, position);
  }

  __device__ __forceinline__ Target<Acc> target_of(std::int64_t class_index) const {
    if (problem_.probabilities) return {-1, classes_ > 0, false, Acc(0)};
    int index = class_of(args_.target, class_index, kOfMany ? args_.class_count() : classes_);
    const bool counts = index >= 0;
    if (kOfMany && counts) {
      index -= static_cast<int>(args_.first_class);
      if (index >= classes_ || index < 0) index = -1;
    }
    const Acc weight = index >= 0 && weight_ ? weight_[index] : Acc(1);
    const Acc mass = kOfMany && index < 0 ? Acc(0) : math::index_mass(problem_, weight);
    const bool is_wanted = kPass == Pass::backward ? args_.grad_lse || args_.grad_entropy : args_.every_row;
    return {index, counts, !counts && !is_wanted, mass};
  }

  // Of a lane that has no row.
  __device__ __forceinline__ static Target<Acc> no_target() { return {-1, false, true, Acc(0)}; }

  // The gradient is zeros, whatever the logits are. A row that does not count may be looked at all the same.
  __device__ __forceinline__ static bool has_no_gradient(const Target<Acc>& target) {
    return kPass == Pass::forward_with_gradient ? !target.counts : target.skip;
  }

  // --- Entries ---

  // The exponential of a difference. In half precision there is no time for an exact one: two bytes of a logit leave
  // memory as quickly as a dozen instructions pass.
  __device__ __forceinline__ static Acc exp(Acc difference) {
    return sizeof(T) == 2 ? math::fast_exp(difference) : math::exp_nonpositive(difference);
  }

  // A logit as the softmax sees it.
  __device__ __forceinline__ math::SeenLogit<Acc> seen(Acc x) const {
    if (!kGeneral || !args_.transforms()) return {x, Acc(1)};
    return math::seen_logit(x, static_cast<Acc>(args_.logit_scale), static_cast<Acc>(args_.logit_softcap));
  }
  __device__ __forceinline__ Acc value(Acc x) const { return seen(x).value; }

  __device__ __forceinline__ bool has_entropy() const { return kAnswers && kPass == Pass::forward && args_.entropy; }
  __device__ __forceinline__ bool has_argmax() const { return kAnswers && kPass != Pass::backward && args_.argmax; }
  __device__ __forceinline__ bool has_entropy_grad() const {
    return kGeneral && kPass == Pass::backward && args_.grad_entropy;
  }

  __device__ __forceinline__ Acc class_weight(int c) const { return weight_ ? weight_[c] : Acc(1); }

  // The mass that every class has: a class's weight, which the smoothing multiplies later, or that of a probability.
  __device__ __forceinline__ Acc mass(std::int64_t position, int c) const {
    if (!problem_.probabilities) return class_weight(c);
    const ClassTensor& q = args_.probabilities;
    const std::int64_t at = offset_of(args_.shape, q, position) + c * q.class_stride;
    return math::probability_mass(problem_, load_floating<Acc>(q.data, q.dtype, at), class_weight(c));
  }

  // Adds kCount logits to a row's statistics, with one rescaling for all of them. class_of(i): the class of a logit;
  // negative where it does not exist, and is -inf.
  template <int kCount, class ClassOf>
  __device__ __forceinline__ void add(Statistics& row, std::int64_t position, const Acc (&logits)[kCount],
                                      ClassOf class_of) const {
    if constexpr (kAnswers) {
      add_general(row, position, logits, class_of);
    } else {
      Acc max = row.max;
#pragma unroll
      for (int i = 0; i < kCount; ++i) max = math::max_ignoring_nan(logits[i], max);
      const Acc shift = math::finite_shift(max);
      Acc sum = Acc(0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += exp(logits[i] - shift);
      row.sum = math::rescale(row.sum, row.max, max) + sum;
      row.max = max;
    }
  }

  // Adds packets of entries that need no more than their logit.
  template <int kPackets>
  __device__ __forceinline__ void add(Statistics& row, const Packet<T> (&packets)[kPackets]) const {
    row.raise(math::max_ignoring_nan(max_of(packets), row.max));
    const Acc shift = math::finite_shift(row.max);
    Acc sum = Acc(0);
#pragma unroll
    for (int u = 0; u < kPackets; ++u) {
      Acc x[kPacketOf<T>];
      packets[u].unpack(x);
#pragma unroll
      for (const Acc entry : x) sum += exp(entry - shift);
    }
    row.sum += sum;
  }

  // Merges the statistics of groups of `width` lanes, a power of two; every lane of the warp takes part, and gets the
  // result of its group. The maximum first: then each lane rescales its sum once.
  __device__ __forceinline__ void merge_lanes(Statistics& row, int width = kWarp) const {
    row.raise(group_max(row.max, width));
    row.sum = group_sum(row.sum, width);
    if constexpr (kGeneral) {
      row.dense_loss = group_sum(row.dense_loss, width);
      row.mass = group_sum(row.mass, width);
    }
    if constexpr (kAnswers) {
      if (has_entropy()) row.gap = group_sum(row.gap, width);
      if (has_argmax()) {
        for (int lane = width / 2; lane > 0; lane /= 2) {
          const Acc value = __shfl_xor_sync(kAllLanes, row.largest.value, lane);
          row.largest.look(value, __shfl_xor_sync(kAllLanes, row.largest.c, lane));
        }
      }
    }
  }

  __device__ __forceinline__ Acc entry_gradient(const Gradient& row, std::int64_t position, Acc x, int c) const {
    if constexpr (kGeneral) {
      const math::SeenLogit<Acc> entry = seen(x);
      const Acc shifted = entry.value - row.shift;
      const Acc all = problem_.dense() ? row.on_all * mass(position, c) : Acc(0);
      const Acc on_class = c == row.target ? all + row.on_target : all;
      const Acc e = exp(shifted);
      const Acc grad = has_entropy_grad() ? math::times_factor(e, row.factor, row.on_gap, shifted) - on_class
                                          : math::logit_grad(e, row.factor, on_class);
      return grad * entry.slope;
    } else {
      const Acc on_class = c == row.target ? row.on_target : Acc(0);
      return math::logit_grad(exp(x - row.shift), row.factor, on_class);
    }
  }

  // Where every entry is treated as if it were not the target's, which is written again.
  __device__ __forceinline__ static Acc other_entry_gradient(const Gradient& row, Acc x) {
    return math::logit_grad(exp(x - row.shift), row.factor, Acc(0));
  }

  // --- Rows ---

  // Writes the class of a row's largest logit, where it is wanted. One thread does so, before its gradient may take the
  // logits' place, or after: the class is known.
  __device__ __forceinline__ void store_argmax(std::int64_t position, const Statistics& statistics) const {
    if constexpr (kAnswers) {
      if (has_argmax()) args_.argmax[position] = statistics.largest.c;
    }
  }

  // Finishes a row, whose target class has target_logit, as the softmax sees it, and writes what is wanted of it. One
  // thread does so, of those that share the row.
  __device__ __forceinline__ void finish_row(std::int64_t position, const Target<Acc>& target,
                                             const Statistics& statistics, Acc target_logit, Sums& sums) const {
    math::FinishedRow<Acc> row{statistics.max, Acc(0), Acc(0), mass_of(statistics), Acc(0)};
    if constexpr (kGeneral) row.dense_loss = static_cast<Acc>(statistics.dense_loss);
    if (has_entropy()) {
      // In float64: the sum may be 1 and a millionth.
      row.log_sum = static_cast<Acc>(math::log(statistics.sum));
      if constexpr (kAnswers) row.gap = static_cast<Acc>(statistics.gap / statistics.sum);
    } else {
      row.log_sum = math::log(static_cast<Acc>(statistics.sum));
    }
    const Acc shifted = target.index < 0 ? Acc(0) : target_logit - row.max;
    const Acc weight = position_weight(position);
    const Acc loss = math::row_loss(problem_, row, {target.counts, target.mass, shifted, weight});
    if (stores_rows_) {
      if (args_.loss.data) store(args_.loss.data, args_.loss.dtype, position, loss);
      if (args_.row_max) {
        static_cast<Acc*>(args_.row_max)[position] = row.max;
        static_cast<Acc*>(args_.row_log_sum)[position] = row.log_sum;
      }
      if (kOfMany && args_.row_mass) {
        static_cast<Acc*>(args_.row_mass)[position] = math::row_mass(problem_, target.mass, row.mass);
      }
      if (args_.lse) static_cast<Acc*>(args_.lse)[position] = row.lse();
      if (has_entropy()) {
        static_cast<Acc*>(args_.entropy)[position] = row.entropy();
        if (args_.row_gap) static_cast<Acc*>(args_.row_gap)[position] = row.gap;
      }
    }
    sums.loss += static_cast<double>(loss);
    if (target.counts) {
      const bool weighted = weight_ && !problem_.probabilities && (!kOfMany || target.index >= 0);
      sums.divisor += (weighted ? static_cast<double>(weight_[target.index]) : 1) * static_cast<double>(weight);
    }
  }

  // The lanes that share rows finish several at a time, one each: were it done at once, by one lane, the others would
  // wait. A position of -1 is none.
  __device__ __forceinline__ void finish_later(std::int64_t position, const Target<Acc>& target,
                                               const Statistics& statistics, Acc target_logit, int lane, int lanes,
                                               Sums& sums) {
    if (lane == rows_waiting_) waiting_ = {position, target, statistics, target_logit};
    if (++rows_waiting_ == lanes) finish_waiting(sums);
  }

  __device__ __forceinline__ void finish_waiting(Sums& sums) {
    const Waiting& row = waiting_;
    if (row.position >= 0) finish_row(row.position, row.target, row.statistics, row.target_logit, sums);
    waiting_.position = -1;
    rows_waiting_ = 0;
  }

  __device__ __forceinline__ Gradient gradient(std::int64_t position, const Target<Acc>& target,
                                               const Statistics& statistics) const {
    const Acc sum = static_cast<Acc>(statistics.sum);
    const auto lse = [&] { return math::log_sum_exp(statistics.max, math::log(sum)); };
    const Acc mass = math::row_mass(problem_, target.mass, mass_of(statistics));
    Gradient result = gradient(position, target, mass, statistics.max, lse, Acc(0));
    result.factor /= sum;
    return result;
  }

  // From the statistics that forward has saved; of_probabilities: their mass.
  __device__ __forceinline__ Gradient saved_gradient(std::int64_t position, const Target<Acc>& target,
                                                     Acc of_probabilities) const {
    const Acc mass = kOfMany && args_.row_mass ? static_cast<const Acc*>(args_.row_mass)[position]
                                               : math::row_mass(problem_, target.mass, of_probabilities);
    const Acc max = static_cast<const Acc*>(args_.row_max)[position];
    const Acc log_sum = static_cast<const Acc*>(args_.row_log_sum)[position];
    const Acc grad_lse = args_.grad_lse ? static_cast<const Acc*>(args_.grad_lse)[position] : Acc(0);
    const auto lse = [&] { return math::log_sum_exp(max, log_sum); };
    Gradient result = gradient(position, target, mass, max, lse, grad_lse);
    if (has_entropy_grad()) {
      math::add_entropy_grad<Acc>(result, static_cast<const Acc*>(args_.grad_entropy)[position],
                                  static_cast<const Acc*>(args_.row_gap)[position]);
      result.on_gap = math::over_sum(result.on_gap, log_sum);
    }
    result.factor = math::over_sum(result.factor, log_sum);
    return result;
  }

  __device__ __forceinline__ static Acc mass_of(const Statistics& statistics) {
    if constexpr (kGeneral) return static_cast<Acc>(statistics.mass);
    return Acc(0);
  }

  // To a probability q_c, whose logit is x, as the softmax sees it.
  __device__ __forceinline__ void store_probability_gradient(const Gradient& row, std::int64_t position, Acc x,
                                                             int c) const {
    const ClassTensor& tensor = args_.grad_probabilities;
    const Acc max = static_cast<const Acc*>(args_.row_max)[position];
    const Acc log_sum = static_cast<const Acc*>(args_.row_log_sum)[position];
    const Acc grad = math::probability_grad(x - max, log_sum, row.on_all, problem_.keep, class_weight(c));
    store(tensor.data, tensor.dtype, offset_of(args_.shape, tensor, position) + c * tensor.class_stride, grad);
  }

 protected:
  const CrossEntropyArgs& args_;
  const int classes_;
  const Acc* const weight_;
  math::RowProblem<Acc> problem_;

 private:
  __device__ __forceinline__ Acc position_weight(std::int64_t position) const {
    return weight_at<Acc>(args_.sample_weight, position);
  }

  __device__ __forceinline__ double counted_divisor() const {
    if (args_.has_probabilities) return classes_ > 0 ? static_cast<double>(args_.shape.positions()) : 0;
    Sums sums;
    sums.divisor = count(args_.target, args_.shape, weight_, threadIdx.x, blockDim.x);
    return block_sum_for_all(sums).divisor;
  }

  template <int kCount, class ClassOf>
  __device__ __forceinline__ void add_general(Statistics& row, std::int64_t position, const Acc (&logits)[kCount],
                                              ClassOf class_of) const {
    if (has_argmax()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (class_of(i) >= 0) row.largest.look(logits[i], class_of(i));
      }
    }
    Acc x[kCount], max = row.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = class_of(i) < 0 ? -math::kInfinity<Acc> : value(logits[i]);  // a cap would make a number of -inf
      max = math::max_ignoring_nan(x[i], max);
    }
    if (max > row.max) row.raise(max);
    const Acc shift = math::finite_shift(max);
    if (has_entropy()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Acc shifted = x[i] - shift, e = exp(shifted);
        row.sum += static_cast<double>(e);
        row.gap += static_cast<double>(math::times_gap(e, shifted));
      }
    } else {
      Acc sum = Acc(0);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += exp(x[i] - shift);
      row.sum += sum;
    }
    if (!problem_.dense()) return;
    Acc loss = Acc(0);
    for (int i = 0; i < kCount; ++i) {
      const int c = class_of(i);
      if (c < 0) continue;  // 0 * inf, of no mass and an infinite distance, would be NaN
      const Acc mass = this->mass(position, c);
      loss += math::entry_loss_at_max(x[i] - shift, mass);
      row.mass += static_cast<double>(mass);
    }
    row.dense_loss += loss;
  }

  // Its factor is not divided yet. lse(): only where it is needed, since a logarithm is dear.
  template <class Lse>
  __device__ __forceinline__ Gradient gradient(std::int64_t position, const Target<Acc>& target, Acc mass, Acc max,
                                               Lse lse, Acc grad_lse) const {
    const PositionTensor& grad_loss = args_.grad_loss;
    double g = scale_;
    if (grad_loss.data) g *= load_floating<double>(grad_loss.data, grad_loss.dtype, position * grad_loss.stride);
    return {math::row_gradient(problem_, {target.counts, target.mass, Acc(0)}, mass,
                               problem_.z_loss == Acc(0) ? Acc(0) : lse(),
                               static_cast<Acc>(g) * position_weight(position), grad_lse),
            math::finite_shift(max), target.index};
  }

  struct Waiting {
    std::int64_t position = -1;
    Target<Acc> target;
    Statistics statistics;
    Acc target_logit;
  };

  double scale_ = 1;  // of grad_loss
  bool stores_rows_;  // something is wanted of each row
  Waiting waiting_;   // the row that this lane finishes
  int rows_waiting_ = 0;
};

}  // namespace fusedloss::cuda
