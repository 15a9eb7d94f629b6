// Cross entropy on the CPU. Forward reads each logit from memory once and writes a row's loss and statistics, and the
// gradient too where it is asked for; backward reads each logit once more and writes the gradient.
//
// Two orders of traversal, by where neighbours in memory lie:
//   rows     (cross_entropy_rows.inl) classes are neighbours; vector loops run along the classes of one position
//   columns  (cross_entropy_columns.inl) positions are neighbours, or there are few classes; along positions
// Here is what both need: the targets, and the loss and the gradient's factors from a row's statistics. Any strides
// will do in either order. Ignored rows are not read in row order. A row is never split over threads.

#include "../../math/cross_entropy.h"
#include "../../math/reduction.h"
#include "../class_loss.h"
#include "blocks.h"
#include "memory.h"
#include "scratch.h"

namespace fusedloss::cpu {
namespace {

// Up to kLanes consecutive positions and what is known of each. The masses are defined in math/cross_entropy.h.
template <class Acc>
struct Group {
  using Class = typename math::Format<Acc>::Int;
  static constexpr Class kNoClass = -1;

  std::int64_t begin;
  int count;
  // Flags are as wide as the values beside them: a vector loop over mixed widths is left scalar.
  Class target[kLanes];       // a class index, or kNoClass: ignored, invalid, or the target is probabilities
  Class counts[kLanes];       // contributes to the loss
  Class skip[kLanes];         // contributes to nothing that is asked for
  Acc target_mass[kLanes];    // the mass on the target class alone
  Acc mass[kLanes];           // the mass on all classes
  Acc target_logit[kLanes];   // the maximum where there is no target class
  double dense_loss[kLanes];  // the sum of (max - x_c) times the mass that every class has
  Acc max[kLanes];
  double sum[kLanes];  // of exp(x - max)
  Acc log_sum[kLanes];
  Acc loss[kLanes];
  Acc grad_loss[kLanes];        // what flows into the loss
  double softmax_grad[kLanes];  // what exp(x - max) is multiplied by in the gradient
};

template <class Acc>
class CrossEntropy {
 protected:
  explicit CrossEntropy(const CrossEntropyArgs& args)
      : args_(args),
        classes_(args.shape.classes),
        weight_(static_cast<const Acc*>(args.weight)),
        smoothing_{Acc(1 - args.label_smoothing), Acc(args.label_smoothing / double(args.shape.classes))},
        z_loss_(Acc(args.z_loss)),
        cap_(args.logit_softcap),
        probabilities_(args.has_probabilities),
        dense_(probabilities_ || args.label_smoothing != 0),
        gradient_(args.grad_logits.data != nullptr) {
    double weight_sum = weight_ ? 0 : double(classes_);
    if (weight_ && dense_) {
      for (std::int64_t c = 0; c < classes_; ++c) weight_sum += double(weight_[c]);
    }
    spread_mass_ = dense_ ? double(smoothing_.spread) * weight_sum : 0;
  }

  std::int64_t offset(const ClassTensor& tensor, std::int64_t position, std::int64_t c = 0) const {
    const std::int64_t inner = args_.shape.inner;
    // A division for each short row would take as long as the row itself.
    if (args_.shape.outer == 1) return position * tensor.inner_stride + c * tensor.class_stride;
    return position / inner * tensor.outer_stride + position % inner * tensor.inner_stride + c * tensor.class_stride;
  }

  // Replaces x by the capped logits, and writes the cap's slopes. In float64: what the cap rounds off, exp magnifies.
  void cap(Acc* x, Acc* slopes, std::int64_t count) const {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const auto capped = math::soft_cap(double(x[i]), cap_);
      x[i] = static_cast<Acc>(capped.value);
      slopes[i] = static_cast<Acc>(capped.slope);
    }
  }

  Acc weight(std::int64_t c) const { return weight_ ? weight_[c] : Acc(1); }

  void load_targets(Group<Acc>& group, Partial& partial) const {
    if (probabilities_) {
      for (int i = 0; i < group.count; ++i) {
        group.target[i] = Group<Acc>::kNoClass;
        group.counts[i] = true;
        group.skip[i] = false;
        group.target_mass[i] = Acc(0);
      }
      if (classes_ > 0) partial.divisor += group.count;  // native divides the logits' number by that of the classes
      return;
    }
    using Class = typename Group<Acc>::Class;
    const std::int64_t ignore_index = args_.target.ignore_index, classes = classes_;
    const Class lse_wanted = args_.every_lse || args_.grad_lse;
    const int count = group.count;
    std::int64_t buffer[kLanes], valid[kLanes], target[kLanes];
    const std::int64_t* targets = load_positions(args_.target.index, group.begin, count, buffer);
    std::int64_t counted = 0, invalid = 0;
#pragma omp simd reduction(+ : counted, invalid)
    for (int i = 0; i < count; ++i) {
      const std::int64_t in_range = (targets[i] >= 0) & (targets[i] < classes);
      const std::int64_t ignored = targets[i] == ignore_index;
      valid[i] = in_range & ~ignored & 1;
      counted += valid[i];
      invalid += (in_range | ignored) ^ 1;
      target[i] = valid[i] ? targets[i] : std::int64_t(Group<Acc>::kNoClass);
    }
    for (int i = 0; i < count; ++i) {
      group.target[i] = static_cast<Class>(target[i]);
      group.counts[i] = static_cast<Class>(valid[i]);
    }
#pragma omp simd
    for (int i = 0; i < count; ++i) group.skip[i] = !group.counts[i] & !lse_wanted;
    for (int i = 0; invalid > 0 && partial.invalid < 0 && i < count; ++i) {
      if (!valid[i] && targets[i] != ignore_index) partial.invalid = group.begin + i;
    }

    if (weight_) {
      for (int i = 0; i < count; ++i) {
        const Acc target_weight = valid[i] ? weight_[target[i]] : Acc(0);
        partial.divisor += double(target_weight);
        group.target_mass[i] = smoothing_.keep * target_weight;
      }
    } else {
      partial.divisor += double(counted);
#pragma omp simd
      for (int i = 0; i < count; ++i) group.target_mass[i] = math::zero_if(!group.counts[i], smoothing_.keep);
    }
    const Acc spread_mass = static_cast<Acc>(spread_mass_);
#pragma omp simd
    for (int i = 0; i < count; ++i) group.mass[i] = math::zero_if(!group.counts[i], group.target_mass[i] + spread_mass);
  }

  // From the statistics: all positions at once, since one logarithm after the other would take a good part of the
  // time that short rows have.
  void losses(Group<Acc>& group) const {
    const int count = group.count;
    const double scale = probabilities_ ? 1 : double(smoothing_.spread);
    double log_sum[kLanes], loss[kLanes];
#pragma omp simd
    for (int i = 0; i < count; ++i) log_sum[i] = math::log(group.sum[i]);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const double shifted = double(group.target_logit[i]) - double(group.max[i]);
      loss[i] = math::entry_loss(shifted, log_sum[i], double(group.target_mass[i]));
    }
    if (dense_) {
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        const double spread_mass = probabilities_ ? double(group.mass[i]) : spread_mass_;
        loss[i] += scale * group.dense_loss[i] + spread_mass * log_sum[i];
      }
    }
    if (classes_ == 0) std::fill_n(loss, count, 0.0);  // the loss of nothing, where the formula has 0 * log(0)
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      group.log_sum[i] = static_cast<Acc>(log_sum[i]);
      group.loss[i] = static_cast<Acc>(loss[i]);
    }
    if (z_loss_ != 0) {
      for (int i = 0; i < count; ++i) {
        group.loss[i] += math::z_term(math::log_sum_exp(group.max[i], group.log_sum[i]), z_loss_);
      }
    }
#pragma omp simd
    for (int i = 0; i < count; ++i) group.loss[i] = math::zero_if(!group.counts[i], group.loss[i]);
  }

  void finish(const Group<Acc>& group, Partial& partial) const {
    const int lanes = group.count;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < lanes; ++i) sum += double(group.loss[i]);
    partial.loss += sum;
    if (args_.loss.data) store(args_.loss.data, args_.loss.dtype, group.begin, 1, lanes, group.loss);
    if (args_.row_max) {
      std::copy_n(group.max, lanes, static_cast<Acc*>(args_.row_max) + group.begin);
      std::copy_n(group.log_sum, lanes, static_cast<Acc*>(args_.row_log_sum) + group.begin);
    }
    if (!args_.lse) return;
    Acc* lse = static_cast<Acc*>(args_.lse) + group.begin;
    for (int i = 0; i < lanes; ++i) lse[i] = math::log_sum_exp(group.max[i], group.log_sum[i]);
  }

  // For backward: forward's statistics.
  void load_statistics(Group<Acc>& group) const {
    std::copy_n(static_cast<const Acc*>(args_.row_max) + group.begin, group.count, group.max);
    std::copy_n(static_cast<const Acc*>(args_.row_log_sum) + group.begin, group.count, group.log_sum);
#pragma omp simd
    for (int i = 0; i < group.count; ++i) {
      // log(sum) of no less than 0 is the rule; all logits -inf or an infinite one give -inf and NaN.
      const double log_sum = double(group.log_sum[i]);
      group.sum[i] = log_sum >= 0 ? 1 / math::exp_nonpositive(-log_sum) : log_sum - log_sum;
    }
  }

  void load_grad_loss(Group<Acc>& group) const {
    const double scale = math::mean_scale(args_.flow.divisor);
    Acc buffer[kLanes];
    const Acc* g = load_positions(args_.flow.grad_loss, group.begin, group.count, buffer);
    for (int i = 0; i < group.count; ++i) group.grad_loss[i] = Acc(double(g[i]) * scale);
#pragma omp simd
    for (int i = 0; i < group.count; ++i) {
      group.grad_loss[i] = math::zero_if(!group.counts[i], group.grad_loss[i]);
    }
  }

  // The factor of the softmax in the gradient, divided by its sum.
  void set_softmax_grads(Group<Acc>& group, int begin, int end) const {
    const Acc* grad_lse = static_cast<const Acc*>(args_.grad_lse);
    if (z_loss_ == 0 && !grad_lse) {
#pragma omp simd
      for (int i = begin; i < end; ++i) {
        group.softmax_grad[i] = double(group.grad_loss[i]) * double(group.mass[i]) / group.sum[i];
      }
      return;
    }
    for (int i = begin; i < end; ++i) {
      const double lse = z_loss_ == 0 ? 0 : double(group.max[i]) + math::log(group.sum[i]);
      const double from_lse = grad_lse ? double(grad_lse[group.begin + i]) : 0;
      group.softmax_grad[i] =
          math::normaliser_grad(double(group.grad_loss[i]), from_lse, double(group.mass[i]), lse, double(z_loss_)) /
          group.sum[i];
    }
  }

  const Acc* probabilities(std::int64_t position, std::int64_t c, std::int64_t stride, std::int64_t count,
                           Acc* buffer) const {
    const ClassTensor& q = args_.probabilities;
    return load(q.data, q.dtype, offset(q, position, c), stride, count, buffer);
  }

  const CrossEntropyArgs& args_;
  const std::int64_t classes_;
  const Acc* weight_;
  const math::Smoothing<Acc> smoothing_;
  const Acc z_loss_;
  const double cap_;
  const bool probabilities_;
  const bool dense_;     // every class has mass, not the target alone
  const bool gradient_;  // is asked for
  double spread_mass_;   // the mass that smoothing spreads over all classes
};

}  // namespace
}  // namespace fusedloss::cpu

#include "cross_entropy_columns.inl"
#include "cross_entropy_rows.inl"

namespace fusedloss::cpu {
namespace {

// Calls body(traversal, block_begin, block_end, block) for each block. Block by block: a group that starts elsewhere
// has other lanes in a vector loop's remainder, and other last bits.
template <class F>
void for_each_block(const CrossEntropyArgs& args, std::int64_t begin, std::int64_t end, F body) {
  const std::int64_t size = positions_per_block(args), positions = args.shape.positions();
  const auto run = [&](const auto& traversal) {
    for (std::int64_t block = begin; block < end; ++block) {
      body(traversal, block * size, std::min(positions, (block + 1) * size), block);
    }
  };
  with_accumulate(args.logits.dtype, [&]<class Acc>() {
    if (row_order(args.shape, args.logits)) {
      run(Rows<Acc>(args));
    } else {
      run(Columns<Acc>(args));
    }
  });
}

void cross_entropy_forward(const CrossEntropyArgs& args, Partial* partials, std::int64_t begin, std::int64_t end) {
  for_each_block(args, begin, end, [&](const auto& traversal, auto first, auto last, auto block) {
    traversal.forward(first, last, partials[block]);
  });
}

void cross_entropy_backward(const CrossEntropyArgs& args, Partial*, std::int64_t begin, std::int64_t end) {
  for_each_block(args, begin, end,
                 [&](const auto& traversal, auto first, auto last, auto) { traversal.backward(first, last); });
}

// The divisor of the mean, and whether all targets are valid, before anything else is done.
void cross_entropy_count(const CrossEntropyArgs& args, Partial* partials, std::int64_t begin, std::int64_t end) {
  for_each_block(args, begin, end, [&](const auto& traversal, auto first, auto last, auto block) {
    traversal.count(first, last, partials[block]);
  });
}

}  // namespace
}  // namespace fusedloss::cpu
