// Part of cross_entropy.inl: column order, where positions lie side by side, or a position has few classes.
//
// The logits of a group of positions are loaded into a tile of (classes, lanes) in scratch memory, which the
// exponentials and then the gradient replace. Vector loops run along the lanes, so that none is idle however few the
// classes are. Many classes get fewer lanes: the tile must not outgrow the second-level cache.

namespace fusedloss::cpu {
namespace {

// (lines, lanes) elements; lines lie `stride` apart.
template <class Acc>
struct Tile {
  Acc* data;
  std::int64_t stride;
  std::int64_t lines;
  int lanes;

  Acc* line(std::int64_t index) const { return data + index * stride; }
};

// The loops below are functions of their own: inlined into the traversal, GCC 12 finds no vector form for them.

template <class Acc>
[[gnu::noinline]] void find_largest(const Tile<Acc>& tile, Acc* max) {
  std::fill_n(max, tile.lanes, -math::kInfinity<Acc>);
  for (std::int64_t c = 0; c < tile.lines; ++c) {
    const Acc* x = tile.line(c);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) max[i] = x[i] > max[i] ? x[i] : max[i];
  }
}

template <class Acc>
[[gnu::noinline]] void take_exponentials(const Tile<Acc>& tile, const Acc* shift) {
  for (std::int64_t c = 0; c < tile.lines; ++c) {
    Acc* x = tile.line(c);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) x[i] = math::exp_nonpositive(x[i] - shift[i]);
  }
}

// As in rows, four are added before they become float64.
template <class Acc>
[[gnu::noinline]] void add_lines(const Tile<Acc>& tile, double* sum) {
  std::fill_n(sum, tile.lanes, 0.0);
  std::int64_t c = 0;
  for (; c + 4 <= tile.lines; c += 4) {
    const Acc *first = tile.line(c), *second = tile.line(c + 1), *third = tile.line(c + 2), *fourth = tile.line(c + 3);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) sum[i] += double((first[i] + second[i]) + (third[i] + fourth[i]));
  }
  for (; c < tile.lines; ++c) {
    const Acc* e = tile.line(c);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) sum[i] += double(e[i]);
  }
}

// Replaces the tile by its exponentials, and adds them, each in float64, and their products with the gaps: an entropy
// is little more than what the smallest add up to.
template <class Acc>
[[gnu::noinline]] void take_exponentials_and_gaps(const Tile<Acc>& tile, const Acc* shift, double* sum, double* gap) {
  std::fill_n(sum, tile.lanes, 0.0);
  std::fill_n(gap, tile.lanes, 0.0);
  std::int64_t c = 0;
  for (; c + 2 <= tile.lines; c += 2) {
    Acc *first = tile.line(c), *second = tile.line(c + 1);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) {
      const Acc first_shifted = first[i] - shift[i], second_shifted = second[i] - shift[i];
      const Acc first_e = math::exp_nonpositive(first_shifted), second_e = math::exp_nonpositive(second_shifted);
      first[i] = first_e;
      second[i] = second_e;
      sum[i] += double(first_e) + double(second_e);
      gap[i] += double(math::times_gap(first_e, first_shifted) + math::times_gap(second_e, second_shifted));
    }
  }
  for (; c < tile.lines; ++c) {
    Acc* x = tile.line(c);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) {
      const Acc shifted = x[i] - shift[i], e = math::exp_nonpositive(shifted);
      x[i] = e;
      sum[i] += double(e);
      gap[i] += double(math::times_gap(e, shifted));
    }
  }
}

// What the entries of each lane share in their gradients, as they need it.
template <class Acc>
struct Shared {
  Acc factor[kLanes], on_target[kLanes], on_all[kLanes], on_gap[kLanes];
};

// Replaces the tile by its exponentials times the factors that entries of their own gaps have.
template <class Acc>
[[gnu::noinline]] void take_weighted_exponentials(const Tile<Acc>& tile, const Acc* max, const Shared<Acc>& rows) {
  for (std::int64_t c = 0; c < tile.lines; ++c) {
    Acc* x = tile.line(c);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) {
      const Acc shifted = x[i] - max[i];
      x[i] = math::times_factor(math::exp_nonpositive(shifted), rows.factor[i], rows.on_gap[i], shifted);
    }
  }
}

// The classes of the largest logits, the first of several, where NaN is larger than any number.
template <class Acc>
[[gnu::noinline]] void find_argmax(const Tile<Acc>& tile, std::int64_t* argmax) {
  using Class = typename Group<Acc>::Class;
  Acc largest[kLanes];
  Class found[kLanes] = {};
  std::fill_n(largest, tile.lanes, -math::kInfinity<Acc>);
  for (std::int64_t c = 0; c < tile.lines; ++c) {
    const Acc* x = tile.line(c);
    const Class this_class = static_cast<Class>(c);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) {
      const bool is_larger = (x[i] > largest[i]) | ((x[i] != x[i]) & (largest[i] == largest[i]));
      found[i] = is_larger ? this_class : found[i];
      largest[i] = is_larger ? x[i] : largest[i];
    }
  }
  std::copy_n(found, tile.lanes, argmax);
}

// From exponentials to gradients, for class indices. kDense: every class has mass.
template <bool kDense, class Acc>
[[gnu::noinline]] void target_gradients(const Tile<Acc>& tile, const Group<Acc>& group, const Shared<Acc>& rows,
                                        const Acc* weights) {
  using Class = typename Group<Acc>::Class;
  for (std::int64_t c = 0; c < tile.lines; ++c) {
    Acc* e = tile.line(c);
    const Class this_class = static_cast<Class>(c);
    const Acc weight = kDense && weights ? weights[c] : Acc(1);
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) {
      const Acc on_target = math::zero_if(group.target[i] != this_class, rows.on_target[i]);
      const Acc on_class = kDense ? rows.on_all[i] * weight + on_target : on_target;
      e[i] = math::zero_if(group.no_grad[i], math::logit_grad(e[i], rows.factor[i], on_class));
    }
  }
}

template <class Acc>
class Columns {
 public:
  explicit Columns(const CrossEntropyArgs& args) : p_(args), lanes_(column_lanes(args.shape.classes)) {
    const std::int64_t size = p_.classes * lanes_;
    tile_ = static_cast<Acc*>(scratch((1 + (p_.cap != 0) + p_.problem.probabilities) * size * sizeof(Acc)));
    slopes_ = tile_ + size;
    masses_ = p_.cap != 0 ? slopes_ + size : slopes_;
  }

  void count(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) p_.load_targets(group, partial);
  }

  void forward(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      p_.load_targets(group, partial);
      load_tile(group);
      statistics(group);
      p_.finish(group, partial);
      if (p_.gradient) gradient<Sum::fresh>(group);
    }
  }

  void backward(std::int64_t begin, std::int64_t end) const {
    Partial unused;
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      p_.load_targets(group, unused);
      p_.load_statistics(group);
      load_tile(group);
      if (p_.problem.probabilities) load_masses(group);
      if (p_.args.grad_probabilities.data) probability_gradient(group);
      if (p_.gradient) gradient<Sum::saved>(group);
    }
  }

 private:
  // A group stays inside one outer index, so that its positions lie at one stride.
  bool next_group(Group<Acc>& group, std::int64_t begin, std::int64_t end) const {
    const std::int64_t inner = p_.args.shape.inner;
    group.begin = begin;
    group.count = begin < end ? static_cast<int>(std::min({end - begin, lanes_, inner - begin % inner})) : 0;
    return group.count > 0;
  }

  Acc* line(std::int64_t c) const { return tile_ + c * lanes_; }
  Tile<Acc> tile(const Group<Acc>& group) const { return {tile_, lanes_, p_.classes, group.count}; }

  void load_tile(const Group<Acc>& group) const {
    const ClassTensor& logits = p_.args.logits;
    load_lines(logits.data, logits.dtype, p_.offset(logits, group.begin), logits.class_stride, logits.inner_stride,
               p_.classes, group.count, tile_, lanes_);
    if (p_.args.argmax) find_argmax(tile(group), p_.args.argmax + group.begin);
    if (!p_.args.transforms()) return;
    for (std::int64_t c = 0; c < p_.classes; ++c) p_.transform(line(c), line(c), slopes_ + c * lanes_, group.count);
  }

  // Probabilities become their masses once, in a tile of their own.
  void load_masses(Group<Acc>& group) const {
    const ClassTensor& q = p_.args.probabilities;
    load_lines(q.data, q.dtype, p_.offset(q, group.begin), q.class_stride, q.inner_stride, p_.classes, group.count,
               masses_, lanes_);
    std::fill_n(group.mass, group.count, 0.0);
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      Acc* a = masses_ + c * lanes_;
      const Acc w = p_.weight(c);
#pragma omp simd
      for (int i = 0; i < group.count; ++i) {
        a[i] = math::probability_mass(p_.problem, a[i], w);
        group.mass[i] += double(a[i]);
      }
    }
  }

  // Replaces the tile by its exponentials.
  void statistics(Group<Acc>& group) const {
    const int lanes = group.count;
    Acc shift[kLanes];
    find_largest(tile(group), group.max);
    for (int i = 0; i < lanes; ++i) {
      group.target_logit[i] = group.target[i] >= 0 ? line(group.target[i])[i] : group.max[i];
    }
#pragma omp simd
    for (int i = 0; i < lanes; ++i) shift[i] = math::finite_shift(group.max[i]);
    if (p_.problem.dense()) add_masses(group, shift);
    if (p_.entropy) {
      take_exponentials_and_gaps(tile(group), shift, group.sum, group.gap);
    } else {
      take_exponentials(tile(group), shift);
      add_lines(tile(group), group.sum);
    }
  }

  // What the masses that all classes have add to the statistics.
  void add_masses(Group<Acc>& group, const Acc* shift) const {
    const int lanes = group.count;
    std::fill_n(group.dense_loss, lanes, 0.0);
    if (p_.problem.probabilities) load_masses(group);
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      const Acc* x = line(c);
      if (p_.problem.probabilities) {
        const Acc* a = masses_ + c * lanes_;
#pragma omp simd
        for (int i = 0; i < lanes; ++i) group.dense_loss[i] += double(math::entry_loss_at_max(x[i] - shift[i], a[i]));
      } else {
        const Acc a = p_.weight(c);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) group.dense_loss[i] += double(math::entry_loss_at_max(x[i] - shift[i], a));
      }
    }
  }

  // Replaces the tile by the gradient, and stores it. The tile holds the exponentials if their sum is fresh, else the
  // logits.
  template <Sum kSum>
  void gradient(Group<Acc>& group) const {
    const int lanes = group.count;
    Shared<Acc> rows;
    p_.load_grads(group);
    if (kSum == Sum::saved) p_.load_masses_of_all(group);
    p_.with_problem([&](const math::RowProblem<double>& problem) __attribute__((always_inline)) {
#pragma omp simd
      for (int i = 0; i < lanes; ++i) {
        const auto row = p_.template row_gradient<kSum>(problem, group, i);
        rows.factor[i] = Acc(row.factor);
        rows.on_target[i] = Acc(row.on_target);
        rows.on_all[i] = Acc(row.on_all);
      }
    });
    if (p_.args.grad_entropy) {
      add_entropy_grads(group, rows);
    } else if (kSum == Sum::saved) {
      take_exponentials(tile(group), group.max);
    }
    if (p_.only_scaled()) scale(rows, lanes);
    if (!p_.problem.dense()) target_gradients<false>(tile(group), group, rows, p_.weights);
    if (p_.problem.dense() && !p_.problem.probabilities) target_gradients<true>(tile(group), group, rows, p_.weights);
    for (std::int64_t c = 0; c < p_.classes && p_.problem.probabilities; ++c) {
      Acc* e = line(c);
      const Acc* a = masses_ + c * lanes_;
#pragma omp simd
      for (int i = 0; i < lanes; ++i) e[i] = math::logit_grad(e[i], rows.factor[i], rows.on_all[i] * a[i]);
    }
    for (std::int64_t c = 0; c < p_.classes && p_.cap != 0; ++c) {
      Acc* grad = line(c);
      const Acc* slopes = slopes_ + c * lanes_;
#pragma omp simd
      for (int i = 0; i < lanes; ++i) grad[i] = math::zero_if(group.no_grad[i], grad[i] * slopes[i]);
    }
    const ClassTensor& grad = p_.args.grad_logits;
    store_lines(grad.data, grad.dtype, p_.offset(grad, group.begin), grad.class_stride, grad.inner_stride, p_.classes,
                lanes, tile_, lanes_);
  }

  // Replaces the tile by exponentials that have their factors.
  void add_entropy_grads(const Group<Acc>& group, Shared<Acc>& rows) const {
    for (int i = 0; i < group.count; ++i) {
      math::RowGradient<double> row{double(rows.factor[i])};
      p_.add_entropy_grad(row, group, i);
      rows.factor[i] = Acc(row.factor);
      rows.on_gap[i] = Acc(row.on_gap);
    }
    take_weighted_exponentials(tile(group), group.max, rows);
    std::fill_n(rows.factor, group.count, Acc(1));
  }

  void scale(Shared<Acc>& rows, int lanes) const {
    const Acc slope = Acc(p_.scale);
#pragma omp simd
    for (int i = 0; i < lanes; ++i) {
      rows.factor[i] *= slope;
      rows.on_target[i] *= slope;
      rows.on_all[i] *= slope;
    }
  }

  void probability_gradient(Group<Acc>& group) const {
    const int lanes = group.count;
    const ClassTensor& tensor = p_.args.grad_probabilities;
    p_.load_grads(group);
    for (std::int64_t c = 0; c < p_.classes; ++c) {
      Acc grad[kLanes];
      const Acc* x = line(c);
      const Acc w = p_.weight(c);
#pragma omp simd
      for (int i = 0; i < lanes; ++i) {
        grad[i] =
            math::probability_grad(x[i] - group.max[i], Acc(group.log_sum[i]), group.grad_loss[i], p_.problem.keep, w);
      }
      store(tensor.data, tensor.dtype, p_.offset(tensor, group.begin, c), tensor.inner_stride, lanes, grad);
    }
  }

  const CrossEntropy<Acc> p_;
  const std::int64_t lanes_;
  Acc* tile_;
  Acc* slopes_;
  Acc* masses_;
};

}  // namespace
}  // namespace fusedloss::cpu
