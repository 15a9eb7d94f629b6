// Cross entropy on the CPU. Forward reads each logit from memory once and writes a row's loss and statistics, and the
// gradient too where it is asked for; backward reads each logit once more and writes the gradient.
//
// Two orders of traversal, by where neighbours in memory lie:
//   rows     (cross_entropy_rows.inl) classes are neighbours; vector loops run along the classes of one position
//   columns  (cross_entropy_columns.inl) positions are neighbours, or there are few classes; along positions
// Here is what both need around the formulas of csrc/math/cross_entropy.h: targets, and statistics that are saved. Any
// strides will do in either order. Ignored rows are not read in row order. A row is split over threads where rows are
// few and long.

#include "../../math/cross_entropy.h"
#include "../../math/reduction.h"
#include "../class_loss.h"
#include "blocks.h"
#include "cpu.h"
#include "memory.h"
#include "scratch.h"
#include "tiles.h"

#include "exponentials.inl"

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
  Class target[kLanes];   // a class index, or kNoClass: ignored, invalid, or the target is probabilities
  Class counts[kLanes];   // contributes to the loss
  Class skip[kLanes];     // contributes to nothing that is asked for
  Class no_grad[kLanes];  // has a gradient of zeros, whatever its logits are
  int taken[kLanes];      // those that are not skipped, of which there are taken_count; in row order alone
  int taken_count;
  Acc target_mass[kLanes];   // on the target class alone
  Acc target_logit[kLanes];  // the maximum where there is no target class
  Acc weight[kLanes];        // of the position
  // The statistics, and what becomes of them.
  Acc max[kLanes];
  double sum[kLanes];         // of exp(x - max)
  double gap[kLanes];         // of exp(x - max) (max - x), where the entropy is wanted
  double dense_loss[kLanes];  // where every class has mass
  double mass[kLanes];        // of probabilities
  double log_sum[kLanes];
  // What flows into the loss and the lse.
  Acc grad_loss[kLanes];
  Acc grad_lse[kLanes];

  math::FinishedRow<double> row(int i) const { return {double(max[i]), log_sum[i], dense_loss[i], mass[i], 0}; }
  math::RowTarget<double> target_of(int i) const {
    return {counts[i] != 0, double(target_mass[i]), double(target_logit[i]) - double(max[i]), double(weight[i])};
  }
};

// What the entries of each position share in their gradients: math::RowGradient, by lanes.
template <class Value>
struct Shared {
  Value factor[kLanes], on_target[kLanes], on_all[kLanes], on_gap[kLanes];
};

// Where a gradient's exponentials have their sum from.
enum class Sum { fresh, saved };

template <class Acc>
struct CrossEntropy {
  explicit CrossEntropy(const CrossEntropyArgs& args)
      : args(args),
        classes(args.shape.classes),
        weights(static_cast<const Acc*>(args.weight)),
        scale(args.logit_scale),
        cap(args.logit_softcap),
        gradient(args.grad_logits.data != nullptr),
        entropy(args.entropy != nullptr) {
    const bool spreads = args.label_smoothing != 0 && !args.has_probabilities;
    double weight_sum = weights ? 0 : double(classes);
    for (std::int64_t c = 0; weights && spreads && c < classes; ++c) weight_sum += double(weights[c]);
    problem = problem_of<Acc>(weight_sum);
    wide = problem_of<double>(weight_sum);
  }

  std::int64_t offset(const ClassTensor& tensor, std::int64_t position, std::int64_t c = 0) const {
    const std::int64_t inner = args.shape.inner;
    // A division for each short row would take as long as the row itself.
    if (args.shape.outer == 1) return position * tensor.inner_stride + c * tensor.class_stride;
    return position / inner * tensor.outer_stride + position % inner * tensor.inner_stride + c * tensor.class_stride;
  }

  // Writes logits as the softmax sees them, perhaps over x, and under a cap, their slopes; else the slope is the scale.
  // A cap is taken in float64: what it rounds off, exp magnifies.
  void transform(const Acc* x, Acc* seen, Acc* slopes, std::int64_t count) const {
    if (cap == 0) {
      const Acc factor = Acc(scale);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) seen[i] = x[i] * factor;
      return;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const auto logit = math::seen_logit(double(x[i]), scale, cap);
      seen[i] = static_cast<Acc>(logit.value);
      slopes[i] = static_cast<Acc>(logit.slope);
    }
  }

  Acc weight(std::int64_t c) const { return weights ? weights[c] : Acc(1); }

  void load_targets(Group<Acc>& group, Partial& partial) const {
    const Acc* sample_weights = load_positions(args.sample_weight, group.begin, group.count, group.weight);
    if (sample_weights != group.weight) std::copy_n(sample_weights, group.count, group.weight);
    if (problem.probabilities) {
      for (int i = 0; i < group.count; ++i) {
        group.target[i] = Group<Acc>::kNoClass;
        group.counts[i] = classes > 0;
        group.skip[i] = group.no_grad[i] = false;
        group.target_mass[i] = Acc(0);
        if (classes > 0) partial.divisor += double(group.weight[i]);  // native divides by the positions
      }
      return;
    }
    if (args.all_classes != 0) return load_targets_of_all(group, partial);
    using Class = typename Group<Acc>::Class;
    const std::int64_t ignore_index = args.target.ignore_index, classes = this->classes;
    const Class wanted = args.every_row, has_grad = args.grad_lse || args.grad_entropy;
    const int count = group.count;
    std::int64_t buffer[kLanes], valid[kLanes], target[kLanes];
    const PositionTensor& index = args.target.index;
    const std::int64_t* targets = load_positions(index, group.begin, count, buffer);
    // Those of the next group: of few classes in half precision, a third of what is read.
    prefetch<false>(index.data, index.dtype, (group.begin + count) * index.stride, count * index.stride);
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
    for (int i = 0; i < count; ++i) {
      group.no_grad[i] = !group.counts[i] & !has_grad;
      group.skip[i] = group.no_grad[i] & !wanted;
    }
    for (int i = 0; invalid > 0 && partial.invalid < 0 && i < count; ++i) {
      if (!valid[i] && targets[i] != ignore_index) partial.invalid = group.begin + i;
    }
    if (!weights) {
      partial.divisor += args.sample_weight.data ? sum_of_weights(group) : double(counted);
      std::fill_n(group.target_mass, count, math::index_mass(problem, Acc(1)));
      return;
    }
    // Without a branch: which positions count may be anything, and a processor would guess wrong.
    Acc target_weight[kLanes];
    for (int i = 0; i < count; ++i) target_weight[i] = math::zero_if(!valid[i], weights[target[i] & -valid[i]]);
    double divisor = 0;
#pragma omp simd reduction(+ : divisor)
    for (int i = 0; i < count; ++i) {
      divisor += double(target_weight[i]) * double(math::zero_if(group.counts[i] == 0, group.weight[i]));
      group.target_mass[i] = math::index_mass(problem, target_weight[i]);
    }
    partial.divisor += divisor;
  }

  // Where the classes are some of many, and the targets any of all.
  [[gnu::noinline]] void load_targets_of_all(Group<Acc>& group, Partial& partial) const {
    std::int64_t buffer[kLanes];
    const std::int64_t* targets = load_positions(args.target.index, group.begin, group.count, buffer);
    for (int i = 0; i < group.count; ++i) {
      const std::int64_t target = targets[i] - args.first_class;
      const bool counts = targets[i] != args.target.ignore_index, here = counts && target >= 0 && target < classes;
      if (counts && (targets[i] < 0 || targets[i] >= args.all_classes) && partial.invalid < 0) {
        partial.invalid = group.begin + i;
      }
      group.target[i] = here ? static_cast<typename Group<Acc>::Class>(target) : Group<Acc>::kNoClass;
      group.counts[i] = counts;
      group.no_grad[i] = !counts && !args.grad_lse && !args.grad_entropy;
      group.skip[i] = group.no_grad[i] && !args.every_row;
      group.target_mass[i] = here ? math::index_mass(problem, weight(target)) : Acc(0);
    }
  }

  // Of the positions that count.
  [[gnu::noinline]] static double sum_of_weights(const Group<Acc>& group) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < group.count; ++i) sum += double(math::zero_if(group.counts[i] == 0, group.weight[i]));
    return sum;
  }

  // Rows that do not exist up to a multiple of any vector's lanes; returns their number. A row must not be what is left
  // of a vector loop: the scalar code for that may round otherwise, and how many rows there are would decide its loss.
  static int pad(Group<Acc>& group) {
    const int padded = static_cast<int>(ceil_div(group.count, kWidest)) * kWidest;
    for (int i = group.count; i < padded; ++i) {
      group.counts[i] = 0;
      group.sum[i] = 1;
      group.target_mass[i] = group.target_logit[i] = group.weight[i] = group.max[i] = 0;
      group.grad_loss[i] = group.grad_lse[i] = 0;
      group.dense_loss[i] = group.mass[i] = group.log_sum[i] = 0;
    }
    return padded;
  }

  // Finishes the rows of a group, all at once: one logarithm after the other would take a good part of the time that
  // short rows have. Inlined into the traversal, these loops are slower: forward of 24 rows takes a fifth longer.
  [[gnu::noinline]] void finish(Group<Acc>& group, Partial& partial) const {
    const int count = group.count, padded = pad(group);
    Acc loss[kLanes];
    double sum = 0;
#pragma omp simd
    for (int i = 0; i < padded; ++i) group.log_sum[i] = math::log_rounded_to<Acc>(group.sum[i]);
    with_problem([&](const math::RowProblem<double>& problem) __attribute__((always_inline)) {
#pragma omp simd
      for (int i = 0; i < padded; ++i) loss[i] = Acc(math::row_loss(problem, group.row(i), group.target_of(i)));
    });
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += double(loss[i]);
    partial.loss += sum;
    if (args.loss.data) store(args.loss.data, args.loss.dtype, group.begin, 1, count, loss);
    if (args.row_max) {
      std::copy_n(group.max, count, static_cast<Acc*>(args.row_max) + group.begin);
      std::copy_n(group.log_sum, count, static_cast<Acc*>(args.row_log_sum) + group.begin);
    }
    if (args.row_mass) {
      Acc* mass = static_cast<Acc*>(args.row_mass) + group.begin;
      for (int i = 0; i < count; ++i) mass[i] = Acc(mass_of(wide, group, i));
    }
    if (args.lse) {
      Acc* lse = static_cast<Acc*>(args.lse) + group.begin;
      for (int i = 0; i < count; ++i) lse[i] = Acc(group.row(i).lse());
    }
    if (entropy) store_entropies(group);
  }

  void store_entropies(const Group<Acc>& group) const {
    for (int i = 0; i < group.count; ++i) {
      auto row = group.row(i);
      row.gap = group.gap[i] / group.sum[i];
      static_cast<Acc*>(args.entropy)[group.begin + i] = Acc(row.entropy());
      if (args.row_gap) static_cast<Acc*>(args.row_gap)[group.begin + i] = Acc(row.gap);
    }
  }

  // All masses of row i together.
  [[gnu::always_inline]] static double mass_of(const math::RowProblem<double>& problem, const Group<Acc>& group,
                                               int i) {
    return math::row_mass(problem, double(group.target_mass[i]), group.mass[i]);
  }

  // For backward: forward's statistics.
  void load_statistics(Group<Acc>& group) const {
    std::copy_n(static_cast<const Acc*>(args.row_max) + group.begin, group.count, group.max);
    std::copy_n(static_cast<const Acc*>(args.row_log_sum) + group.begin, group.count, group.log_sum);
  }

  // For backward too, in the place of what these classes have alone.
  void load_masses_of_all(Group<Acc>& group) const {
    if (args.row_mass) std::copy_n(static_cast<const Acc*>(args.row_mass) + group.begin, group.count, group.mass);
  }

  void load_grads(Group<Acc>& group) const {
    const double mean = math::mean_scale(args.grad_divisor);
    Acc buffer[kLanes];
    const Acc* g = load_positions(args.grad_loss, group.begin, group.count, buffer);
#pragma omp simd
    for (int i = 0; i < group.count; ++i) group.grad_loss[i] = Acc(double(g[i]) * mean * double(group.weight[i]));
    const Acc* grad_lse = static_cast<const Acc*>(args.grad_lse);
    for (int i = 0; i < group.count; ++i) group.grad_lse[i] = grad_lse ? grad_lse[group.begin + i] : Acc(0);
  }

  // What the entries of each row share in their gradients; what multiplies the exponentials is divided by their sum.
  // Those of logits that are only scaled are of the logits as they are given. Returns the number of rows with padding.
  template <Sum kSum>
  [[gnu::noinline]] int share(Group<Acc>& group, Shared<double>& rows) const {
    const int padded = pad(group);
    const double slope = cap == 0 ? scale : 1;
    const bool of_all = kSum == Sum::saved && args.row_mass;
    with_problem([&](const math::RowProblem<double>& problem) __attribute__((always_inline)) {
#pragma omp simd
      for (int i = 0; i < padded; ++i) {
        const double mass =
            of_all ? group.mass[i] : math::row_mass(problem, double(group.target_mass[i]), group.mass[i]);
        auto row = math::row_gradient(problem, group.target_of(i), mass, group.row(i).lse(), double(group.grad_loss[i]),
                                      double(group.grad_lse[i]));
        row.factor = kSum == Sum::saved ? math::over_sum(row.factor, group.log_sum[i]) : row.factor / group.sum[i];
        row = row.through(slope);
        rows.factor[i] = row.factor;
        rows.on_target[i] = row.on_target;
        rows.on_all[i] = row.on_all;
        rows.on_gap[i] = row.on_gap;
      }
    });
    for (int i = 0; args.grad_entropy && i < group.count; ++i) {
      const std::int64_t position = group.begin + i;
      math::RowGradient<double> added{};
      math::add_entropy_grad(added, double(static_cast<const Acc*>(args.grad_entropy)[position]),
                             double(static_cast<const Acc*>(args.row_gap)[position]));
      rows.factor[i] += slope * math::over_sum(added.factor, group.log_sum[i]);
      rows.on_gap[i] = slope * math::over_sum(added.on_gap, group.log_sum[i]);
    }
    return padded;
  }

  const CrossEntropyArgs& args;
  const std::int64_t classes;
  const Acc* const weights;
  const double scale, cap;  // of the logits
  const bool gradient;      // is asked for
  const bool entropy;       // likewise
  math::RowProblem<Acc> problem;
  math::RowProblem<double> wide;  // a row's loss, and what its entries share, are formed in float64

  // Calls body(problem), where the commonest problem is a constant: its target alone has mass, and there is no z loss.
  // The formulas' other terms would take as long as a row of ten classes.
  template <class Body>
  [[gnu::always_inline]] void with_problem(Body body) const {
    constexpr math::RowProblem<double> kCommonest;
    if (wide == kCommonest) return body(kCommonest);
    body(wide);
  }

 private:
  template <class Value>
  math::RowProblem<Value> problem_of(double weight_sum) const {
    return math::row_problem<Value>(args, args.has_probabilities, double(args.class_count()), weight_sum);
  }
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

void cross_entropy_split(const CrossEntropyArgs& args, Partial* partial, void* shared, ParallelFor parallel_for) {
  with_accumulate(args.logits.dtype, [&]<class Acc>() { Rows<Acc>::split(args, partial, shared, parallel_for); });
}

}  // namespace
}  // namespace fusedloss::cpu
