// Part of cross_entropy.inl: column order, where positions lie side by side, or a position has few classes.
//
// The logits of a group of positions are loaded into a tile in scratch memory, which the exponentials and then the
// gradient replace. The tile consists of blocks of (classes, kWidest lanes), a position for each lane: vector loops run
// along the lanes, so that none is idle however few the classes are, and a block stays in the first-level cache through
// all its steps. Many classes get fewer lanes: the tile must not outgrow the second-level cache.

namespace fusedloss::cpu {
namespace {

// kWidest lanes of a tile. What belongs to the lanes (their maxima, say) is passed beside it, from the first lane on.
template <class Acc>
struct Block {
  Acc* data;
  std::int64_t lines;

  Acc* line(std::int64_t index) const { return data + index * kWidest; }
};

// The loops below are functions of their own: inlined into the traversal, GCC 12 finds no vector form for them.

// Two lines at a time: a maximum waits for the one before it.
template <class Acc>
[[gnu::noinline]] void find_largest(const Block<Acc>& block, Acc* max) {
  Acc even[kWidest], odd[kWidest];
  std::fill_n(even, kWidest, -math::kInfinity<Acc>);
  std::fill_n(odd, kWidest, -math::kInfinity<Acc>);
  const Acc* x = block.data;
  for (std::int64_t c = 0; c < block.lines / 2; ++c, x += 2 * kWidest) {
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) even[i] = x[i] > even[i] ? x[i] : even[i];
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) odd[i] = x[kWidest + i] > odd[i] ? x[kWidest + i] : odd[i];
  }
  if (block.lines % 2 == 1) {
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) even[i] = x[i] > even[i] ? x[i] : even[i];
  }
#pragma omp simd
  for (int i = 0; i < kWidest; ++i) max[i] = odd[i] > even[i] ? odd[i] : even[i];
}

// The logits of the targets, or the maxima of positions without one. No branch, as for the targets' weights; and
// without classes, what is read of the tile is not used.
template <class Acc>
[[gnu::noinline]] void find_target_logits(const Block<Acc>& block, int count, const typename Group<Acc>::Class* target,
                                          const Acc* max, Acc* logits) {
  Acc found[kWidest];
  for (int i = 0; i < count; ++i) found[i] = block.line(std::max<std::int64_t>(target[i], 0))[i];
#pragma omp simd
  for (int i = 0; i < kWidest; ++i) logits[i] = math::select(target[i] < 0, max[i], found[i]);
}

// Adds the lines: line(c) is a function of the lane. As in rows, four are added before they become float64.
template <class Line>
[[gnu::always_inline]] inline void add_lines(std::int64_t lines, double* sum, Line line) {
  double sums[kWidest];
  std::fill_n(sums, kWidest, -0.0);
  std::int64_t c = 0;
  for (; c + 4 <= lines; c += 4) {
    const auto first = line(c), second = line(c + 1), third = line(c + 2), fourth = line(c + 3);
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) sums[i] += double((first(i) + second(i)) + (third(i) + fourth(i)));
  }
  for (; c < lines; ++c) {
    const auto rest = line(c);
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) sums[i] += double(rest(i));
  }
  std::copy_n(sums, kWidest, sum);
}

template <class Acc>
[[gnu::noinline]] void add_exponentials(const Block<Acc>& block, double* sum) {
  add_lines(block.lines, sum, [&](std::int64_t c) __attribute__((always_inline)) {
    return [x = block.line(c)](int i) __attribute__((always_inline)) { return x[i]; };
  });
}

// What masses on all classes add to the losses: those of probabilities, which are a block too, or class weights. A
// quarter of each is added, so that four of the largest numbers are one.
template <class Acc>
[[gnu::noinline]] void add_dense_losses(const Block<Acc>& block, const Acc* shift, const Acc* masses, double* sum) {
  add_lines(block.lines, sum, [=](std::int64_t c) __attribute__((always_inline)) {
    return [=, x = block.line(c), a = masses + c * kWidest](int i)
               __attribute__((always_inline)) { return math::entry_loss_at_max(x[i] - shift[i], Acc(0.25) * a[i]); };
  });
  for (int i = 0; i < kWidest; ++i) sum[i] *= 4;
}
template <class Acc>
[[gnu::noinline]] void add_weighted_losses(const Block<Acc>& block, const Acc* shift, const Acc* weights, double* sum) {
  add_lines(block.lines, sum, [=](std::int64_t c) __attribute__((always_inline)) {
    return [=, x = block.line(c), a = Acc(0.25) * weights[c]](int i)
               __attribute__((always_inline)) { return math::entry_loss_at_max(x[i] - shift[i], a); };
  });
  for (int i = 0; i < kWidest; ++i) sum[i] *= 4;
}

// Replaces a block by its exponentials, and adds them, each in float64, and their products with the gaps: an entropy is
// little more than what the smallest add up to.
template <class Acc>
[[gnu::noinline]] void take_exponentials_and_gaps(const Block<Acc>& block, const Acc* shift, double* sum, double* gap) {
  std::fill_n(sum, kWidest, 0.0);
  std::fill_n(gap, kWidest, 0.0);
  for (std::int64_t c = 0; c < block.lines; ++c) {
    Acc* x = block.line(c);
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) {
      const Acc shifted = x[i] - shift[i], e = math::exp_nonpositive(shifted);
      x[i] = e;
      sum[i] += double(e);
      gap[i] += double(math::times_gap(e, shifted));
    }
  }
}

// Replaces a block by its exponentials times the factors that entries of their own gaps have.
template <class Acc>
[[gnu::noinline]] void take_weighted_exponentials(const Block<Acc>& block, const Acc* max, const Acc* factor,
                                                  const Acc* on_gap) {
  for (std::int64_t c = 0; c < block.lines; ++c) {
    Acc* x = block.line(c);
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) {
      const Acc shifted = x[i] - max[i];
      x[i] = math::times_factor(math::exp_nonpositive(shifted), factor[i], on_gap[i], shifted);
    }
  }
}

// The classes of the largest logits, the first of several, where NaN is larger than any number.
template <class Acc>
[[gnu::noinline]] void find_argmax(const Block<Acc>& block, typename Group<Acc>::Class* argmax) {
  using Class = typename Group<Acc>::Class;
  Acc largest[kWidest];
  std::fill_n(largest, kWidest, -math::kInfinity<Acc>);
  std::fill_n(argmax, kWidest, Class(0));
  for (std::int64_t c = 0; c < block.lines; ++c) {
    const Acc* x = block.line(c);
    const Class this_class = static_cast<Class>(c);
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) {
      const bool is_larger = (x[i] > largest[i]) | ((x[i] != x[i]) & (largest[i] == largest[i]));
      argmax[i] = is_larger ? this_class : argmax[i];
      largest[i] = is_larger ? x[i] : largest[i];
    }
  }
}

// From exponentials to gradients, for class indices. kDense: every class has mass.
template <bool kDense, class Acc>
[[gnu::noinline]] void target_gradients(const Block<Acc>& block, const Group<Acc>& group, int first,
                                        const Shared<Acc>& rows, const Acc* weights) {
  using Class = typename Group<Acc>::Class;
  const Class *target = group.target + first, *no_grad = group.no_grad + first;
  const Acc *factor = rows.factor + first, *on_target = rows.on_target + first, *on_all = rows.on_all + first;
  for (std::int64_t c = 0; c < block.lines; ++c) {
    Acc* e = block.line(c);
    const Class this_class = static_cast<Class>(c);
    const Acc weight = kDense && weights ? weights[c] : Acc(1);
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) {
      const Acc on_class = math::zero_if(target[i] != this_class, on_target[i]);
      e[i] = math::zero_if(no_grad[i],
                           math::logit_grad(e[i], factor[i], kDense ? on_all[i] * weight + on_class : on_class));
    }
  }
}

template <class Acc>
class Columns {
 public:
  explicit Columns(const CrossEntropyArgs& args) : p_(args), lanes_(column_lanes(args.shape.classes)) {
    const std::int64_t size = std::max<std::int64_t>(p_.classes, 1) * lanes_,
                       tiles = 1 + (p_.cap != 0) + p_.problem.probabilities;
    tile_ = static_cast<Acc*>(scratch((tiles * size + p_.classes) * sizeof(Acc)));
    slopes_ = tile_ + size;
    masses_ = p_.cap != 0 ? slopes_ + size : slopes_;
    weights_ = p_.weights;
    if (weights_ || !p_.problem.dense()) return;
    weights_ = std::fill_n(tile_ + tiles * size, p_.classes, Acc(1)) - p_.classes;
  }

  void count(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) p_.load_targets(group, partial);
  }

  void forward(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      p_.load_targets(group, partial);
      load_tile(group);
      if (p_.problem.probabilities) load_masses(group);
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

  // The block of a tile that begins at a lane, a multiple of kWidest.
  Block<Acc> block(Acc* tile, int lane) const { return {tile + lane * p_.classes, p_.classes}; }

  // Calls body(block, lane) for the blocks that the group needs of the tile.
  template <class Body>
  [[gnu::always_inline]] void for_each_block(const Group<Acc>& group, Body body) const {
    for (int lane = 0; lane < group.count; lane += kWidest) body(block(tile_, lane), lane);
  }

  void load_lanes(const ClassTensor& tensor, const Group<Acc>& group, Acc* tile) const {
    load_tile_of(tensor.data, tensor.dtype, p_.offset(tensor, group.begin), tensor.class_stride, tensor.inner_stride,
                 p_.classes, group.count, tile);
  }

  // What follows a block: the same lanes of the group behind this one.
  Ahead ahead(const Group<Acc>& group, int lane) const {
    const ClassTensor& tensor = p_.args.logits;
    const std::int64_t size = size_of(tensor.dtype);
    const std::int64_t stride = tensor.inner_stride == 1 ? tensor.class_stride : kWidest;
    return {static_cast<const char*>(tensor.data) + p_.offset(tensor, group.begin + group.count + lane) * size,
            stride * size};
  }

  // The logits, as the softmax sees them.
  void load_tile(const Group<Acc>& group) const {
    load_lanes(p_.args.logits, group, tile_);
    for_each_block(group, [&](const Block<Acc>& block, int lane) {
      if (p_.args.argmax) {
        typename Group<Acc>::Class argmax[kWidest];
        find_argmax(block, argmax);
        std::copy_n(argmax, std::min(kWidest, group.count - lane), p_.args.argmax + group.begin + lane);
      }
      if (p_.args.transforms()) {
        p_.transform(block.data, block.data, slopes_ + lane * p_.classes, p_.classes * kWidest);
      }
    });
  }

  // Probabilities become their masses once, in a tile of their own.
  void load_masses(Group<Acc>& group) const {
    load_lanes(p_.args.probabilities, group, masses_);
    for (int lane = 0; lane < group.count; lane += kWidest) {
      double* mass = group.mass + lane;
      std::fill_n(mass, kWidest, 0.0);
      for (std::int64_t c = 0; c < p_.classes; ++c) {
        Acc* a = block(masses_, lane).line(c);
        const Acc w = p_.weight(c);
#pragma omp simd
        for (int i = 0; i < kWidest; ++i) {
          a[i] = math::probability_mass(p_.problem, a[i], w);
          mass[i] += double(a[i]);
        }
      }
    }
  }

  // Replaces the tile by its exponentials.
  void statistics(Group<Acc>& group) const {
    for_each_block(group, [&](const Block<Acc>& block, int lane) {
      Acc* max = group.max + lane;
      find_largest(block, max);
      find_target_logits(block, std::min(kWidest, group.count - lane), group.target + lane, max,
                         group.target_logit + lane);
      Acc shift[kWidest];
#pragma omp simd
      for (int i = 0; i < kWidest; ++i) shift[i] = math::finite_shift(max[i]);
      if (p_.problem.probabilities) {
        add_dense_losses(block, shift, this->block(masses_, lane).data, group.dense_loss + lane);
      } else if (p_.problem.dense()) {
        add_weighted_losses(block, shift, weights_, group.dense_loss + lane);
      } else {
        std::fill_n(group.dense_loss + lane, kWidest, 0.0);
      }
      if (p_.entropy) {
        take_exponentials_and_gaps(block, shift, group.sum + lane, group.gap + lane);
      } else {
        exponentials<true>(block.data, shift, block.data, kWidest, block.lines, ahead(group, lane));
        add_exponentials(block, group.sum + lane);
      }
    });
  }

  // Replaces the tile by the gradient, and stores it. The tile holds the exponentials if their sum is fresh, else the
  // logits.
  template <Sum kSum>
  void gradient(Group<Acc>& group) const {
    p_.load_grads(group);
    if (kSum == Sum::saved) p_.load_masses_of_all(group);
    Shared<double> wide;
    const int padded = p_.template share<kSum>(group, wide);
    Shared<Acc> rows;
#pragma omp simd
    for (int i = 0; i < padded; ++i) {
      rows.factor[i] = Acc(wide.factor[i]);
      rows.on_target[i] = Acc(wide.on_target[i]);
      rows.on_all[i] = Acc(wide.on_all[i]);
      rows.on_gap[i] = Acc(wide.on_gap[i]);
    }
    for_each_block(group, [&](const Block<Acc>& block, int lane) {
      if (p_.args.grad_entropy) {
        take_weighted_exponentials(block, group.max + lane, rows.factor + lane, rows.on_gap + lane);
        std::fill_n(rows.factor + lane, kWidest, Acc(1));
      } else if (kSum == Sum::saved) {
        exponentials<true>(block.data, group.max + lane, block.data, kWidest, block.lines, ahead(group, lane));
      }
      if (p_.problem.probabilities) {
        probability_gradients(block, this->block(masses_, lane).data, rows.factor + lane, rows.on_all + lane);
      } else if (p_.problem.dense()) {
        target_gradients<true>(block, group, lane, rows, p_.weights);
      } else {
        target_gradients<false>(block, group, lane, rows, p_.weights);
      }
      if (p_.cap != 0) multiply_by_slopes(block, this->block(slopes_, lane).data, group.no_grad + lane);
    });
    const ClassTensor& grad = p_.args.grad_logits;
    store_tile_of(grad.data, grad.dtype, p_.offset(grad, group.begin), grad.class_stride, grad.inner_stride, p_.classes,
                  group.count, tile_);
  }

  static void probability_gradients(const Block<Acc>& block, const Acc* masses, const Acc* factor, const Acc* on_all) {
    for (std::int64_t c = 0; c < block.lines; ++c) {
      Acc* e = block.line(c);
      const Acc* a = masses + c * kWidest;
#pragma omp simd
      for (int i = 0; i < kWidest; ++i) e[i] = math::logit_grad(e[i], factor[i], on_all[i] * a[i]);
    }
  }

  static void multiply_by_slopes(const Block<Acc>& block, const Acc* slopes,
                                 const typename Group<Acc>::Class* no_grad) {
    for (std::int64_t c = 0; c < block.lines; ++c) {
      Acc* grad = block.line(c);
      const Acc* slope = slopes + c * kWidest;
#pragma omp simd
      for (int i = 0; i < kWidest; ++i) grad[i] = math::zero_if(no_grad[i], grad[i] * slope[i]);
    }
  }

  void probability_gradient(Group<Acc>& group) const {
    const ClassTensor& tensor = p_.args.grad_probabilities;
    p_.load_grads(group);
    for_each_block(group, [&](const Block<Acc>& block, int lane) {
      const std::int64_t position = group.begin + lane, count = std::min(kWidest, group.count - lane);
      for (std::int64_t c = 0; c < p_.classes; ++c) {
        Acc grad[kWidest];
        const Acc* x = block.line(c);
        const Acc w = p_.weight(c);
#pragma omp simd
        for (int i = 0; i < kWidest; ++i) {
          const Acc shifted = x[i] - group.max[lane + i], log_sum = Acc(group.log_sum[lane + i]);
          grad[i] = math::probability_grad(shifted, log_sum, group.grad_loss[lane + i], p_.problem.keep, w);
        }
        store(tensor.data, tensor.dtype, p_.offset(tensor, position, c), tensor.inner_stride, count, grad);
      }
    });
  }

  const CrossEntropy<Acc> p_;
  const std::int64_t lanes_;  // of a group
  Acc* tile_;
  Acc* slopes_;         // a tile like it
  Acc* masses_;         // likewise
  const Acc* weights_;  // of the classes, where they have mass
};

}  // namespace
}  // namespace fusedloss::cpu
