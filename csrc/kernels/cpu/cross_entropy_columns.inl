// Cross entropy in column order: positions lie side by side, or a position has few classes.
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

// From exponentials to gradients, for class indices. weights: of the classes, times the smoothing; or null.
template <class Acc>
[[gnu::noinline]] void target_gradients(const Tile<Acc>& tile, const Group<Acc>& group, const Acc* factor,
                                        const Acc* weights, Acc spread) {
  using Class = typename Group<Acc>::Class;
  for (std::int64_t c = 0; c < tile.lines; ++c) {
    Acc* e = tile.line(c);
    const Class this_class = static_cast<Class>(c);
    const Acc on_all = weights ? spread * weights[c] : spread;
#pragma omp simd
    for (int i = 0; i < tile.lanes; ++i) {
      const Acc mass = on_all + math::zero_if(group.target[i] != this_class, group.target_mass[i]);
      e[i] = math::zero_if(group.skip[i], math::logit_grad(e[i], factor[i], group.grad_loss[i] * mass));
    }
  }
}

template <class Acc>
class Columns : CrossEntropy<Acc> {
 public:
  explicit Columns(const CrossEntropyArgs& args) : CrossEntropy<Acc>(args), lanes_(column_lanes(args.shape.classes)) {
    const std::int64_t size = this->classes_ * lanes_;
    tile_ = static_cast<Acc*>(scratch((this->cap_ != 0 ? 2 : 1) * size * sizeof(Acc)));
    slopes_ = tile_ + size;
  }

  void count(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) this->load_targets(group, partial);
  }

  void forward(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      this->load_targets(group, partial);
      load_tile(group);
      find_largest(tile(group), group.max);
      for (int i = 0; i < group.count; ++i) {
        group.target_logit[i] = group.target[i] >= 0 ? line(group.target[i])[i] : group.max[i];
      }
      if (this->dense_) dense(group);
      exponentials(group);
      this->losses(group);
      this->finish(group, partial);
      if (this->gradient_) gradient(group);
    }
  }

  void backward(std::int64_t begin, std::int64_t end) const {
    Partial unused;
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      this->load_targets(group, unused);
      this->load_statistics(group);
      load_tile(group);
      if (this->probabilities_) set_masses(group);
      if (this->args_.grad_probabilities.data) probability_gradient(group);
      if (!this->gradient_) continue;
      take_exponentials(tile(group), group.max);
      gradient(group);
    }
  }

 private:
  // A group stays inside one outer index, so that its positions lie at one stride.
  bool next_group(Group<Acc>& group, std::int64_t begin, std::int64_t end) const {
    const std::int64_t inner = this->args_.shape.inner;
    group.begin = begin;
    group.count = begin < end ? static_cast<int>(std::min({end - begin, lanes_, inner - begin % inner})) : 0;
    return group.count > 0;
  }

  Acc* line(std::int64_t c) const { return tile_ + c * lanes_; }
  Tile<Acc> tile(const Group<Acc>& group) const { return {tile_, lanes_, this->classes_, group.count}; }

  void load_tile(const Group<Acc>& group) const {
    const ClassTensor& logits = this->args_.logits;
    load_lines(logits.data, logits.dtype, this->offset(logits, group.begin), logits.class_stride, logits.inner_stride,
               this->classes_, group.count, tile_, lanes_);
    if (this->cap_ == 0) return;
    for (std::int64_t c = 0; c < this->classes_; ++c) this->cap(line(c), slopes_ + c * lanes_, group.count);
  }

  // Replaces the tile by its exponentials and adds them up.
  void exponentials(Group<Acc>& group) const {
    const int lanes = group.count;
    Acc shift[kLanes];
#pragma omp simd
    for (int i = 0; i < lanes; ++i) shift[i] = math::finite_shift(group.max[i]);
    take_exponentials(tile(group), shift);
    add_lines(tile(group), group.sum);
  }

  // The masses of one class; only for probabilities.
  const Acc* masses(const Group<Acc>& group, std::int64_t c, Acc* buffer) const {
    const int lanes = group.count;
    const Acc* q = this->probabilities(group.begin, c, this->args_.probabilities.inner_stride, lanes, buffer);
    const Acc w = this->weight(c);
#pragma omp simd
    for (int i = 0; i < lanes; ++i) buffer[i] = math::probability_mass(this->smoothing_, q[i], w);
    return buffer;
  }

  void set_masses(Group<Acc>& group) const {
    double mass[kLanes] = {};
    for (std::int64_t c = 0; c < this->classes_; ++c) {
      Acc buffer[kLanes];
      const Acc* a = masses(group, c, buffer);
#pragma omp simd
      for (int i = 0; i < group.count; ++i) mass[i] += double(a[i]);
    }
    for (int i = 0; i < group.count; ++i) group.mass[i] = static_cast<Acc>(mass[i]);
  }

  // What the masses that all classes have add to the loss. Without probabilities these are the class weights; the
  // smoothing multiplies the sum.
  void dense(Group<Acc>& group) const {
    const int lanes = group.count;
    Acc shift[kLanes];
#pragma omp simd
    for (int i = 0; i < lanes; ++i) shift[i] = math::finite_shift(group.max[i]);
    std::fill_n(group.dense_loss, lanes, 0.0);
    if (this->probabilities_) set_masses(group);
    for (std::int64_t c = 0; c < this->classes_; ++c) {
      Acc buffer[kLanes];
      const Acc* x = line(c);
      if (this->probabilities_) {
        const Acc* a = masses(group, c, buffer);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) group.dense_loss[i] += double(math::entry_loss_at_max(x[i] - shift[i], a[i]));
      } else {
        const Acc a = this->weight(c);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) group.dense_loss[i] += double(math::entry_loss_at_max(x[i] - shift[i], a));
      }
    }
  }

  // Replaces the tile of exponentials by the gradient, and stores it.
  void gradient(Group<Acc>& group) const {
    const int lanes = group.count;
    this->load_grad_loss(group);
    this->set_softmax_grads(group, 0, lanes);
    Acc factor[kLanes];
    for (int i = 0; i < lanes; ++i) factor[i] = static_cast<Acc>(group.softmax_grad[i]);
    if (!this->probabilities_) {
      const bool weighted = this->dense_ && this->weight_;
      target_gradients(tile(group), group, factor, weighted ? this->weight_ : nullptr,
                       this->dense_ ? this->smoothing_.spread : Acc(0));
    }
    for (std::int64_t c = 0; c < this->classes_ && this->probabilities_; ++c) {
      Acc buffer[kLanes];
      Acc* e = line(c);
      const Acc* a = masses(group, c, buffer);
#pragma omp simd
      for (int i = 0; i < lanes; ++i) e[i] = math::logit_grad(e[i], factor[i], group.grad_loss[i] * a[i]);
    }
    for (std::int64_t c = 0; c < this->classes_ && this->cap_ != 0; ++c) {
      Acc* grad = line(c);
      const Acc* slopes = slopes_ + c * lanes_;
#pragma omp simd
      for (int i = 0; i < lanes; ++i) grad[i] = math::zero_if(group.skip[i], grad[i] * slopes[i]);
    }
    const ClassTensor& grad = this->args_.grad_logits;
    store_lines(grad.data, grad.dtype, this->offset(grad, group.begin), grad.class_stride, grad.inner_stride,
                this->classes_, lanes, tile_, lanes_);
  }

  void probability_gradient(Group<Acc>& group) const {
    const int lanes = group.count;
    const ClassTensor& tensor = this->args_.grad_probabilities;
    this->load_grad_loss(group);
    for (std::int64_t c = 0; c < this->classes_; ++c) {
      Acc grad[kLanes];
      const Acc* x = line(c);
      const Acc w = this->weight(c);
#pragma omp simd
      for (int i = 0; i < lanes; ++i) {
        grad[i] =
            math::probability_grad(x[i] - group.max[i], group.log_sum[i], group.grad_loss[i], this->smoothing_.keep, w);
      }
      store(tensor.data, tensor.dtype, this->offset(tensor, group.begin, c), tensor.inner_stride, lanes, grad);
    }
  }

  const std::int64_t lanes_;
  Acc* tile_;
  Acc* slopes_;
};

}  // namespace
}  // namespace fusedloss::cpu
