// Cross entropy on the CPU: forward reads each logit once (twice with label smoothing or probability targets) and
// writes a row's statistics and loss; backward reads each logit once and writes its gradient.
//
// Two orders of traversal, by where neighbours in memory lie:
//   rows     classes are neighbours; vector loops run along the classes of one position
//   columns  positions are neighbours, or there are few classes; vector loops run along positions
// Ignored rows are not read in row order. Any strides will do in either order. It does not split a row over threads.

#include "../../math/cross_entropy.h"
#include "../class_loss.h"
#include "blocks.h"
#include "memory.h"

namespace fusedloss::cpu {
namespace {

// Up to kLanes consecutive positions and what is known of each.
template <class Acc>
struct Group {
  using Class = typename math::Format<Acc>::Int;
  static constexpr Class kNoClass = -1;

  std::int64_t begin;
  int count;
  // Flags are as wide as the values beside them: a vector loop over mixed widths is left scalar.
  Class target[kLanes];     // a class index, or kNoClass: ignored, invalid, or the target is probabilities
  Class counts[kLanes];     // contributes to the loss
  Class skip[kLanes];       // contributes to nothing that is asked for
  Acc target_mass[kLanes];  // the mass on the target class alone
  Acc mass[kLanes];         // the mass on all classes
  Acc loss[kLanes];
  Acc max[kLanes];
  Acc log_sum[kLanes];
};

// What the gradient of a position needs, besides the logit itself.
template <class Acc>
struct Flow {
  Acc grad_loss[kLanes];
  Acc normaliser[kLanes];
};

// These two are functions of their own: inlined into the traversal, GCC 12 finds no vector form of their loops.
template <class Acc>
[[gnu::noinline]] void target_column_grads(const Group<Acc>& group, const Flow<Acc>& flow, const Acc* x,
                                           typename Group<Acc>::Class this_class, Acc spread, Acc* grad) {
  const int lanes = group.count;
#pragma omp simd
  for (int i = 0; i < lanes; ++i) {
    const Acc mass = spread + (group.target[i] == this_class ? group.target_mass[i] : Acc(0));
    const Acc value =
        math::logit_grad(x[i] - group.max[i], group.log_sum[i], flow.normaliser[i], flow.grad_loss[i] * mass);
    grad[i] = group.skip[i] ? Acc(0) : value;
  }
}

template <class Acc>
[[gnu::noinline]] void add_exp(const Acc* x, const Acc* shift, double* sum, int count) {
#pragma omp simd
  for (int i = 0; i < count; ++i) sum[i] += double(math::exp_nonpositive(x[i] - shift[i]));
}

template <class Acc>
class CrossEntropy {
 public:
  explicit CrossEntropy(const CrossEntropyArgs& args)
      : args_(args),
        classes_(args.shape.classes),
        weight_(static_cast<const Acc*>(args.weight)),
        smoothing_{Acc(1 - args.label_smoothing), Acc(args.label_smoothing / double(args.shape.classes))},
        z_loss_(Acc(args.z_loss)),
        cap_(args.logit_softcap),
        probabilities_(args.has_probabilities),
        dense_(probabilities_ || args.label_smoothing != 0),
        rows_(row_order(args.shape, args.logits)) {
    std::fill_n(ones_, kChunk, Acc(1));
    double weight_sum = weight_ ? 0 : double(classes_);
    if (weight_ && dense_) {
      for (std::int64_t c = 0; c < classes_; ++c) weight_sum += double(weight_[c]);
    }
    spread_mass_ = dense_ ? Acc(double(smoothing_.spread) * weight_sum) : Acc(0);
  }

  void forward(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      load_targets(group, &partial);
      if (rows_) {
        row_statistics(group);
      } else {
        column_statistics(group);
      }
      losses(group);
      finish(group, partial);
    }
  }

  void backward(std::int64_t begin, std::int64_t end) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      load_targets(group, nullptr);
      load_statistics(group);
      if (probabilities_) masses(group);  // known already for class indices
      gradients(group);
    }
  }

 private:
  // In column order a group stays inside one outer index, so that its positions lie at one stride.
  bool next_group(Group<Acc>& group, std::int64_t begin, std::int64_t end) const {
    group.begin = begin;
    std::int64_t count = std::min<std::int64_t>(end - begin, kLanes);
    if (!rows_ && count > 0) count = std::min(count, args_.shape.inner - begin % args_.shape.inner);
    group.count = static_cast<int>(count);
    return count > 0;
  }

  std::int64_t offset(const ClassTensor& tensor, std::int64_t position, std::int64_t c = 0) const {
    const std::int64_t inner = args_.shape.inner;
    // A division for each short row would take as long as the row itself.
    if (args_.shape.outer == 1) return position * tensor.inner_stride + c * tensor.class_stride;
    return position / inner * tensor.outer_stride + position % inner * tensor.inner_stride + c * tensor.class_stride;
  }

  // `count` logits from `start` on, capped if asked for, and then the cap's slopes too. Capped in float64, since what
  // the cap rounds off, exp magnifies.
  const Acc* logits(std::int64_t start, std::int64_t stride, std::int64_t count, Acc* buffer,
                    Acc* slopes = nullptr) const {
    const Acc* x = load(args_.logits.data, args_.logits.dtype, start, stride, count, buffer);
    if (cap_ == 0) return x;
    if (slopes) {
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) {
        const auto capped = math::soft_cap(double(x[i]), cap_);
        buffer[i] = static_cast<Acc>(capped.value);
        slopes[i] = static_cast<Acc>(capped.slope);
      }
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) buffer[i] = static_cast<Acc>(math::soft_cap(double(x[i]), cap_).value);
    }
    return buffer;
  }

  // Extends x to a multiple of kPadding with logits that change nothing in a sum of exponentials.
  static const Acc* pad(const Acc* x, std::int64_t& count, Acc* buffer) {
    if (x != buffer) std::copy_n(x, count, buffer);
    while (count % kPadding != 0) buffer[count++] = -math::kInfinity<Acc>;
    return buffer;
  }

  Acc weight(std::int64_t c) const { return weight_ ? weight_[c] : Acc(1); }

  // The weights of the classes from c on, for at most kChunk of them.
  const Acc* weights(std::int64_t c) const { return weight_ ? weight_ + c : ones_; }

  void load_targets(Group<Acc>& group, Partial* partial) const {
    using Class = typename Group<Acc>::Class;
    const bool lse_wanted = args_.every_lse || args_.grad_lse;
    if (probabilities_) {
      for (int i = 0; i < group.count; ++i) {
        group.target[i] = Group<Acc>::kNoClass;
        group.counts[i] = true;
        group.skip[i] = false;
        group.target_mass[i] = Acc(0);
      }
      if (partial) partial->divisor += group.count;
      return;
    }
    const PositionTensor& index = args_.target.index;
    std::int64_t buffer[kLanes];
    const std::int64_t* targets =
        load(index.data, index.dtype, group.begin * index.stride, index.stride, group.count, buffer);
    for (int i = 0; i < group.count; ++i) {
      const bool ignored = targets[i] == args_.target.ignore_index;
      const bool counts = !ignored && targets[i] >= 0 && targets[i] < classes_;
      if (partial && partial->invalid < 0 && !ignored && !counts) partial->invalid = group.begin + i;
      const Acc target_weight = counts ? weight(targets[i]) : Acc(0);
      if (partial) partial->divisor += double(target_weight);
      group.target[i] = counts ? static_cast<Class>(targets[i]) : Group<Acc>::kNoClass;
      group.counts[i] = counts;
      group.skip[i] = !counts && !lse_wanted;
      group.target_mass[i] = smoothing_.keep * target_weight;
      group.mass[i] = counts ? group.target_mass[i] + spread_mass_ : Acc(0);
    }
  }

  // All at once: one logarithm after the other would take a good part of the time that short rows have.
  void set_log_sums(Group<Acc>& group, const double* sums) const {
#pragma omp simd
    for (int i = 0; i < group.count; ++i) group.log_sum[i] = static_cast<Acc>(math::log(sums[i]));
  }

  void row_statistics(Group<Acc>& group) const {
    Acc buffer[kChunk];
    double sums[kLanes];
    for (int i = 0; i < group.count; ++i) {
      math::LogSumExp<Acc, double> row;
      const std::int64_t start = offset(args_.logits, group.begin + i);
      for (std::int64_t c = 0; c < classes_ && !group.skip[i]; c += kChunk) {
        std::int64_t count = std::min<std::int64_t>(kChunk, classes_ - c);
        const Acc* x = logits(start + c, 1, count, buffer);
        if (count % kPadding != 0) x = pad(x, count, buffer);
        Acc max = -math::kInfinity<Acc>;
#pragma omp simd reduction(max : max)
        for (std::int64_t k = 0; k < count; ++k) max = x[k] > max ? x[k] : max;
        const Acc shift = math::finite_shift(max);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t k = 0; k < count; ++k) sum += double(math::exp_nonpositive(x[k] - shift));
        if (c == 0) {
          row = {max, sum};
        } else {
          row.merge(max, sum);
        }
      }
      group.max[i] = row.max;
      sums[i] = row.sum;
    }
    set_log_sums(group, sums);
  }

  void column_statistics(Group<Acc>& group) const {
    Acc tile[kTileClasses][kLanes];
    const Acc* line[kTileClasses];
    const int lanes = group.count;
    double total[kLanes] = {};
    for (int i = 0; i < lanes; ++i) group.max[i] = -math::kInfinity<Acc>;
    for (std::int64_t c = 0; c < classes_; c += kTileClasses) {
      const int count = static_cast<int>(std::min<std::int64_t>(kTileClasses, classes_ - c));
      Acc max[kLanes], shift[kLanes];
      double sum[kLanes] = {};
      for (int i = 0; i < lanes; ++i) max[i] = -math::kInfinity<Acc>;
      for (int k = 0; k < count; ++k) {
        const Acc* x = logits(offset(args_.logits, group.begin, c + k), args_.logits.inner_stride, lanes, tile[k]);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) max[i] = x[i] > max[i] ? x[i] : max[i];
        line[k] = x;
      }
#pragma omp simd
      for (int i = 0; i < lanes; ++i) shift[i] = math::finite_shift(max[i]);
      for (int k = 0; k < count; ++k) {
        add_exp(line[k], shift, sum, lanes);
      }
#pragma omp simd
      for (int i = 0; i < lanes; ++i) {
        const Acc larger = max[i] > group.max[i] ? max[i] : group.max[i];
        total[i] = math::rescale(total[i], group.max[i], larger) + math::rescale(sum[i], max[i], larger);
        group.max[i] = larger;
      }
    }
    set_log_sums(group, total);
  }

  void losses(Group<Acc>& group) const {
    double dense[kLanes] = {};  // from the mass that every class has
    if (dense_) {
      if (rows_) {
        row_losses(group, dense);
      } else {
        column_losses(group, dense);
      }
    }
    for (int i = 0; i < group.count; ++i) {
      double loss = probabilities_ ? dense[i] : double(smoothing_.spread) * dense[i];
      if (group.target[i] != Group<Acc>::kNoClass) {
        Acc x;
        x = *logits(offset(args_.logits, group.begin + i, group.target[i]), 1, 1, &x);
        const Acc on_target = math::entry_loss(x - group.max[i], group.log_sum[i], group.target_mass[i]);
        loss = dense_ ? loss + double(on_target) : double(on_target);
      }
      const Acc lse = math::log_sum_exp(group.max[i], group.log_sum[i]);
      group.loss[i] = group.counts[i] ? static_cast<Acc>(loss) + math::z_term(lse, z_loss_) : Acc(0);
    }
  }

  // The second reading of the logits, with the finished statistics.
  void row_losses(const Group<Acc>& group, double* losses) const {
    Acc x_buffer[kChunk], q_buffer[kChunk];
    for (int i = 0; i < group.count; ++i) {
      if (!group.counts[i]) continue;
      const Acc max = group.max[i], log_sum = group.log_sum[i];
      double loss = 0;
      for (std::int64_t c = 0; c < classes_; c += kChunk) {
        const std::int64_t count = std::min<std::int64_t>(kChunk, classes_ - c);
        const Acc* x = logits(offset(args_.logits, group.begin + i, c), 1, count, x_buffer);
        const Acc* w = weights(c);
        if (probabilities_) {
          const Acc* q = probabilities(group.begin + i, c, args_.probabilities.class_stride, count, q_buffer);
#pragma omp simd reduction(+ : loss)
          for (std::int64_t k = 0; k < count; ++k) {
            const Acc mass = math::probability_mass(smoothing_, q[k], w[k]);
            loss += double(math::entry_loss(x[k] - max, log_sum, mass));
          }
        } else {
#pragma omp simd reduction(+ : loss)
          for (std::int64_t k = 0; k < count; ++k) loss += double(math::entry_loss(x[k] - max, log_sum, w[k]));
        }
      }
      losses[i] = loss;
    }
  }

  void column_losses(const Group<Acc>& group, double* losses) const {
    Acc x_buffer[kLanes], q_buffer[kLanes];
    const int lanes = group.count;
    for (std::int64_t c = 0; c < classes_; ++c) {
      const Acc* x = logits(offset(args_.logits, group.begin, c), args_.logits.inner_stride, lanes, x_buffer);
      const Acc w = weight(c);
      if (probabilities_) {
        const Acc* q = probabilities(group.begin, c, args_.probabilities.inner_stride, lanes, q_buffer);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
          const Acc mass = math::probability_mass(smoothing_, q[i], w);
          losses[i] += double(math::entry_loss(x[i] - group.max[i], group.log_sum[i], mass));
        }
      } else {
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
          losses[i] += double(math::entry_loss(x[i] - group.max[i], group.log_sum[i], w));
        }
      }
    }
  }

  // The sums of the probabilities' masses.
  void masses(Group<Acc>& group) const {
    Acc q_buffer[kChunk];
    const int lanes = group.count;
    if (rows_) {
      for (int i = 0; i < lanes; ++i) {
        double mass = 0;
        for (std::int64_t c = 0; c < classes_; c += kChunk) {
          const std::int64_t count = std::min<std::int64_t>(kChunk, classes_ - c);
          const Acc* q = probabilities(group.begin + i, c, args_.probabilities.class_stride, count, q_buffer);
          const Acc* w = weights(c);
#pragma omp simd reduction(+ : mass)
          for (std::int64_t k = 0; k < count; ++k) mass += double(math::probability_mass(smoothing_, q[k], w[k]));
        }
        group.mass[i] = static_cast<Acc>(mass);
      }
    } else {
      double mass[kLanes] = {};
      for (std::int64_t c = 0; c < classes_; ++c) {
        const Acc* q = probabilities(group.begin, c, args_.probabilities.inner_stride, lanes, q_buffer);
        const Acc w = weight(c);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) mass[i] += double(math::probability_mass(smoothing_, q[i], w));
      }
      for (int i = 0; i < lanes; ++i) group.mass[i] = static_cast<Acc>(mass[i]);
    }
  }

  const Acc* probabilities(std::int64_t position, std::int64_t c, std::int64_t stride, std::int64_t count,
                           Acc* buffer) const {
    const ClassTensor& q = args_.probabilities;
    return load(q.data, q.dtype, offset(q, position, c), stride, count, buffer);
  }

  void finish(const Group<Acc>& group, Partial& partial) const {
    const int lanes = group.count;
    for (int i = 0; i < lanes; ++i) partial.loss += double(group.loss[i]);
    if (args_.loss.data) store(args_.loss.data, args_.loss.dtype, group.begin, 1, lanes, group.loss);

    Acc* max = static_cast<Acc*>(args_.row_max) + group.begin;
    Acc* log_sum = static_cast<Acc*>(args_.row_log_sum) + group.begin;
    Acc* lse = args_.lse ? static_cast<Acc*>(args_.lse) + group.begin : nullptr;
    for (int i = 0; i < lanes; ++i) {
      max[i] = group.max[i];
      log_sum[i] = group.log_sum[i];
      if (lse) lse[i] = math::log_sum_exp(max[i], log_sum[i]);
    }
  }

  void load_statistics(Group<Acc>& group) const {
    for (int i = 0; i < group.count; ++i) {
      group.max[i] = static_cast<const Acc*>(args_.row_max)[group.begin + i];
      group.log_sum[i] = static_cast<const Acc*>(args_.row_log_sum)[group.begin + i];
    }
  }

  void gradients(Group<Acc>& group) const {
    const int lanes = group.count;
    const PositionTensor& grad_loss = args_.grad_loss;
    const Acc* grad_lse = static_cast<const Acc*>(args_.grad_lse);
    Flow<Acc> flow;
    Acc buffer[kLanes];
    const Acc* g =
        load(grad_loss.data, grad_loss.dtype, group.begin * grad_loss.stride, grad_loss.stride, lanes, buffer);
    for (int i = 0; i < lanes; ++i) {
      flow.grad_loss[i] = group.counts[i] ? Acc(double(g[i]) * args_.grad_scale) : Acc(0);
      flow.normaliser[i] =
          math::normaliser_grad(flow.grad_loss[i], grad_lse ? grad_lse[group.begin + i] : Acc(0), group.mass[i],
                                math::log_sum_exp(group.max[i], group.log_sum[i]), z_loss_);
    }
    if (rows_) {
      row_gradients(group, flow);
    } else {
      column_gradients(group, flow);
    }
  }

  void row_gradients(const Group<Acc>& group, const Flow<Acc>& flow) const {
    Acc x_buffer[kChunk], q_buffer[kChunk], grad_buffer[kChunk], slopes[kChunk];
    const ClassTensor& grad_logits = args_.grad_logits;
    const ClassTensor& grad_probabilities = args_.grad_probabilities;
    for (int i = 0; i < group.count; ++i) {
      const std::int64_t position = group.begin + i;
      const Acc max = group.max[i], g = flow.grad_loss[i];
      const Acc log_sum = group.log_sum[i], normaliser = flow.normaliser[i];
      for (std::int64_t c = 0; c < classes_; c += kChunk) {
        const std::int64_t count = std::min<std::int64_t>(kChunk, classes_ - c);
        const Acc* w = weights(c);
        const Acc* x = nullptr;
        if (!group.skip[i]) x = logits(offset(args_.logits, position, c), 1, count, x_buffer, slopes);
        if (grad_logits.data) {
          const std::int64_t at = offset(grad_logits, position, c);
          Acc* grad = destination(grad_logits.data, grad_logits.dtype, at, grad_logits.class_stride, grad_buffer);
          if (group.skip[i]) {
            std::fill_n(grad, count, Acc(0));
          } else if (probabilities_) {
            const Acc* q = probabilities(position, c, args_.probabilities.class_stride, count, q_buffer);
#pragma omp simd
            for (std::int64_t k = 0; k < count; ++k) {
              const Acc a = math::probability_mass(smoothing_, q[k], w[k]);
              grad[k] = math::logit_grad(x[k] - max, log_sum, normaliser, g * a);
            }
          } else {
            const Acc spread = g * smoothing_.spread;
            std::int64_t padded = count;
            // Without smoothing no class weight is looked at: 0 times an infinite one would be NaN.
            if (!dense_) {
              w = ones_;
              if (count % kPadding != 0) {
                x = pad(x, padded, x_buffer);
                grad = grad_buffer;
              }
            }
#pragma omp simd
            for (std::int64_t k = 0; k < padded; ++k) {
              grad[k] = math::logit_grad(x[k] - max, log_sum, normaliser, spread * w[k]);
            }
            const std::int64_t t = std::int64_t(group.target[i]) - c;
            if (t >= 0 && t < count) grad[t] -= g * group.target_mass[i];
          }
          if (cap_ != 0 && !group.skip[i]) {
#pragma omp simd
            for (std::int64_t k = 0; k < count; ++k) grad[k] *= slopes[k];
          }
          store(grad_logits.data, grad_logits.dtype, at, grad_logits.class_stride, count, grad);
        }
        if (grad_probabilities.data) {
#pragma omp simd
          for (std::int64_t k = 0; k < count; ++k) {
            grad_buffer[k] = math::probability_grad(x[k] - max, log_sum, g, smoothing_.keep, w[k]);
          }
          store(grad_probabilities.data, grad_probabilities.dtype, offset(grad_probabilities, position, c),
                grad_probabilities.class_stride, count, grad_buffer);
        }
      }
    }
  }

  void column_gradients(const Group<Acc>& group, const Flow<Acc>& flow) const {
    Acc x_buffer[kLanes], q_buffer[kLanes], grad_buffer[kLanes], slopes[kLanes];
    const ClassTensor& grad_logits = args_.grad_logits;
    const ClassTensor& grad_probabilities = args_.grad_probabilities;
    const int lanes = group.count;
    for (std::int64_t c = 0; c < classes_; ++c) {
      const Acc* x = logits(offset(args_.logits, group.begin, c), args_.logits.inner_stride, lanes, x_buffer, slopes);
      const Acc w = weight(c);
      if (grad_logits.data) {
        const std::int64_t at = offset(grad_logits, group.begin, c);
        Acc* grad = destination(grad_logits.data, grad_logits.dtype, at, grad_logits.inner_stride, grad_buffer);
        if (probabilities_) {
          const Acc* q = probabilities(group.begin, c, args_.probabilities.inner_stride, lanes, q_buffer);
#pragma omp simd
          for (int i = 0; i < lanes; ++i) {
            const Acc a = math::probability_mass(smoothing_, q[i], w);
            grad[i] =
                math::logit_grad(x[i] - group.max[i], group.log_sum[i], flow.normaliser[i], flow.grad_loss[i] * a);
          }
        } else {
          target_column_grads(group, flow, x, static_cast<typename Group<Acc>::Class>(c),
                              dense_ ? smoothing_.spread * w : Acc(0), grad);
        }
        if (cap_ != 0) {
#pragma omp simd
          for (int i = 0; i < lanes; ++i) {
            grad[i] = group.skip[i] ? Acc(0) : grad[i] * slopes[i];
          }
        }
        store(grad_logits.data, grad_logits.dtype, at, grad_logits.inner_stride, lanes, grad);
      }
      if (grad_probabilities.data) {
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
          grad_buffer[i] =
              math::probability_grad(x[i] - group.max[i], group.log_sum[i], flow.grad_loss[i], smoothing_.keep, w);
        }
        store(grad_probabilities.data, grad_probabilities.dtype, offset(grad_probabilities, group.begin, c),
              grad_probabilities.inner_stride, lanes, grad_buffer);
      }
    }
  }

  const CrossEntropyArgs& args_;
  const std::int64_t classes_;
  const Acc* weight_;
  const math::Smoothing<Acc> smoothing_;
  const Acc z_loss_;
  const double cap_;
  const bool probabilities_;
  const bool dense_;  // every class has mass, not the target alone
  const bool rows_;
  Acc spread_mass_;   // the mass that smoothing spreads over all classes
  Acc ones_[kChunk];  // the class weights where there are none
};

void cross_entropy_forward(const CrossEntropyArgs& args, std::int64_t begin, std::int64_t end) {
  with_accumulate(args.logits.dtype, [&]<class Acc>() {
    const CrossEntropy<Acc> kernel(args);
    const std::int64_t size = positions_per_block(args), positions = args.shape.positions();
    for (std::int64_t block = begin; block < end; ++block) {
      kernel.forward(block * size, std::min(positions, (block + 1) * size), args.partials[block]);
    }
  });
}

void cross_entropy_backward(const CrossEntropyArgs& args, std::int64_t begin, std::int64_t end) {
  with_accumulate(args.logits.dtype, [&]<class Acc>() {
    const CrossEntropy<Acc> kernel(args);
    const std::int64_t size = positions_per_block(args), positions = args.shape.positions();
    // Block by block: a group that starts elsewhere has other lanes in a vector loop's remainder, and other last bits.
    for (std::int64_t block = begin; block < end; ++block) {
      kernel.backward(block * size, std::min(positions, (block + 1) * size));
    }
  });
}

}  // namespace
}  // namespace fusedloss::cpu
