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
  int index;    // -1: no class
  bool counts;  // contributes to the loss
  bool skip;    // contributes to nothing that is asked for
  Acc mass;     // on the target class alone
};

// Merges the statistics of groups of `width` lanes, a power of two; every lane of the warp takes part, and gets the
// result of its group. The maximum first: then each lane rescales its sum once.
template <class Acc, bool kDense>
__device__ __forceinline__ void merge_lanes(math::RowStatistics<Acc, kDense>& row, int width = kWarp) {
  row.raise(group_max(row.max, width));
  row.sum = group_sum(row.sum, width);
  if constexpr (kDense) {
    row.dense_loss = group_sum(row.dense_loss, width);
    row.mass = group_sum(row.mass, width);
  }
}

// kGeneral: entries need more than their logit: smoothing, probabilities or a soft cap.
template <class T, bool kGeneral, Pass kPass>
class CrossEntropy {
 public:
  using Acc = Accumulate<T>;
  using Statistics = math::RowStatistics<Acc, kGeneral>;

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
        stores_rows_(args.loss.data || args.row_max || args.lse) {
    if constexpr (kGeneral) {
      double weight_sum = classes_;
      if (weight_ && args.label_smoothing != 0 && !args.has_probabilities) {
        Sums sums;
        for (int c = threadIdx.x; c < classes_; c += blockDim.x) sums.loss += static_cast<double>(weight_[c]);
        weight_sum = block_sum_for_all(sums).loss;
      }
      problem_ = math::row_problem<Acc>(args, args.has_probabilities, classes_, weight_sum);
    }
    if constexpr (kPass == Pass::backward) {
      scale_ = math::mean_scale(args.grad_divisor);
    } else if constexpr (kPass == Pass::forward_with_gradient) {
      if (args.total.reduction == Reduction::mean) {
        const double divisor = run.divisor ? *run.divisor : counted_divisor();
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
    const int index = class_of(args_.target, class_index, classes_);
    const bool counts = index >= 0;
    const Acc weight = counts && weight_ ? weight_[index] : Acc(1);
    const bool lse_is_wanted = kPass == Pass::backward ? args_.grad_lse != nullptr : args_.every_lse;
    return {index, counts, !counts && !lse_is_wanted, math::index_mass(problem_, weight)};
  }

  // Of a lane that has no row.
  __device__ __forceinline__ static Target<Acc> no_target() { return {-1, false, true, Acc(0)}; }

  // --- Entries ---

  // The exponential of a difference. In half precision there is no time for an exact one: two bytes of a logit leave
  // memory as quickly as a dozen instructions pass.
  __device__ __forceinline__ static Acc exp(Acc difference) {
    return sizeof(T) == 2 ? math::fast_exp(difference) : math::exp_nonpositive(difference);
  }

  __device__ __forceinline__ bool capped() const { return kGeneral && args_.logit_softcap != 0; }

  __device__ __forceinline__ Acc value(Acc x) const {
    return capped() ? math::soft_cap(x, static_cast<Acc>(args_.logit_softcap)).value : x;
  }

  __device__ __forceinline__ Acc class_weight(int c) const { return weight_ ? weight_[c] : Acc(1); }

  // The mass that every class has: a class's weight, which the smoothing multiplies later, or that of a probability.
  __device__ __forceinline__ Acc mass(std::int64_t position, int c) const {
    if (!problem_.probabilities) return class_weight(c);
    const ClassTensor& q = args_.probabilities;
    const std::int64_t at = offset_of(args_.shape, q, position) + c * q.class_stride;
    return math::probability_mass(problem_, load_floating<Acc>(q.data, q.dtype, at), class_weight(c));
  }

  // Adds kCount entries to a row's statistics, with one rescaling for all of them. class_of(i): the class of an entry;
  // negative where it does not exist, and is -inf.
  template <int kCount, class ClassOf>
  __device__ __forceinline__ void add(Statistics& row, std::int64_t position, const Acc (&x)[kCount],
                                      ClassOf class_of) const {
    Acc max = row.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) max = math::max_ignoring_nan(x[i], max);
    const Acc shift = math::finite_shift(max);
    Acc sum = Acc(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp(x[i] - shift);
    if constexpr (kGeneral) {
      if (problem_.dense()) {
        Statistics part;
        part.max = max;
        part.sum = sum;
        for (int i = 0; i < kCount; ++i) {
          const int c = class_of(i);
          if (c < 0) continue;  // 0 * inf, of no mass and an infinite distance, would be NaN
          const Acc mass = this->mass(position, c);
          part.dense_loss += math::entry_loss_at_max(x[i] - shift, mass);
          part.mass += static_cast<double>(mass);
        }
        row.merge(part);
        return;
      }
    }
    row.sum = math::rescale(row.sum, row.max, max) + sum;
    row.max = max;
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

  __device__ __forceinline__ Acc entry_gradient(const Gradient& row, std::int64_t position, Acc x, int c) const {
    if constexpr (kGeneral) {
      math::SoftCap<Acc> entry{x, Acc(1)};
      if (capped()) entry = math::soft_cap(x, static_cast<Acc>(args_.logit_softcap));
      const Acc all = problem_.dense() ? row.on_all * mass(position, c) : Acc(0);
      const Acc on_class = c == row.target ? all + row.on_target : all;
      return math::logit_grad(exp(entry.value - row.shift), row.factor, on_class) * entry.slope;
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

  // Finishes a row, whose target class has the (capped) logit target_logit, and writes what is wanted of it. One thread
  // does so, of those that share the row.
  __device__ __forceinline__ void finish_row(std::int64_t position, const Target<Acc>& target,
                                             const Statistics& statistics, Acc target_logit, Sums& sums) const {
    math::FinishedRow<Acc> row{statistics.max, math::log(statistics.sum), Acc(0), mass_of(statistics)};
    if constexpr (kGeneral) row.dense_loss = statistics.dense_loss;
    const Acc shifted = target.index < 0 ? Acc(0) : target_logit - row.max;
    const Acc loss = math::row_loss(problem_, row, {target.counts, target.mass, shifted});
    if (stores_rows_) {
      if (args_.loss.data) store(args_.loss.data, args_.loss.dtype, position, loss);
      if (args_.row_max) {
        static_cast<Acc*>(args_.row_max)[position] = row.max;
        static_cast<Acc*>(args_.row_log_sum)[position] = row.log_sum;
      }
      if (args_.lse) static_cast<Acc*>(args_.lse)[position] = row.lse();
    }
    sums.loss += static_cast<double>(loss);
    if (target.counts) {
      const bool weighted = weight_ && !problem_.probabilities;
      sums.divisor += weighted ? static_cast<double>(weight_[target.index]) : 1;
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
    const auto lse = [&] { return math::log_sum_exp(statistics.max, math::log(statistics.sum)); };
    Gradient result = gradient(position, target, mass_of(statistics), statistics.max, lse, Acc(0));
    result.factor /= statistics.sum;
    return result;
  }

  // From the statistics that forward has saved; mass: that of probabilities.
  __device__ __forceinline__ Gradient saved_gradient(std::int64_t position, const Target<Acc>& target, Acc mass) const {
    const Acc max = static_cast<const Acc*>(args_.row_max)[position];
    const Acc log_sum = static_cast<const Acc*>(args_.row_log_sum)[position];
    const Acc grad_lse = args_.grad_lse ? static_cast<const Acc*>(args_.grad_lse)[position] : Acc(0);
    const auto lse = [&] { return math::log_sum_exp(max, log_sum); };
    Gradient result = gradient(position, target, mass, max, lse, grad_lse);
    result.factor = math::over_sum(result.factor, log_sum);
    return result;
  }

  __device__ __forceinline__ static Acc mass_of(const Statistics& statistics) {
    if constexpr (kGeneral) return static_cast<Acc>(statistics.mass);
    return Acc(0);
  }

  // To a probability q_c, whose (capped) logit is x.
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
  __device__ __forceinline__ double counted_divisor() const {
    if (args_.has_probabilities) return classes_ > 0 ? static_cast<double>(args_.shape.positions()) : 0;
    Sums sums;
    sums.divisor = count(args_.target, args_.shape, weight_, threadIdx.x, blockDim.x);
    return block_sum_for_all(sums).divisor;
  }

  // Its factor is not divided yet. lse(): only where it is needed, since a logarithm is dear.
  template <class Lse>
  __device__ __forceinline__ Gradient gradient(std::int64_t position, const Target<Acc>& target, Acc mass, Acc max,
                                               Lse lse, Acc grad_lse) const {
    const PositionTensor& grad_loss = args_.grad_loss;
    double g = scale_;
    if (grad_loss.data) g *= load_floating<double>(grad_loss.data, grad_loss.dtype, position * grad_loss.stride);
    return {math::row_gradient(problem_, {target.counts, target.mass, Acc(0)}, mass,
                               problem_.z_loss == Acc(0) ? Acc(0) : lse(), static_cast<Acc>(g), grad_lse),
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
