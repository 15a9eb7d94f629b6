// Part of cross_entropy.inl: row order, where the classes of a position lie side by side.
//
// A row is read once, in chunks: each is loaded, its maximum is found and its exponentials, relative to that maximum,
// are added up and kept. When the row's own maximum is known the kept exponentials become the gradient: a factor for
// each chunk, minus the target's masses. They are kept where the gradient will lie if it has the accumulate type, else
// in scratch memory; either way they are still in the second-level cache.

namespace fusedloss::cpu {
namespace {

// The logits that are needed next. They need not exist.
struct Ahead {
  const char* data;
  std::int64_t size;  // of one
};

// The loops below are functions of their own: inlined into the traversal, GCC 12 finds no vector form for some.

// Writes the exponentials of a multiple of kPadding elements. Meanwhile the logits ahead come into the cache, a line at
// a time: a processor fetches few lines at once, and would wait for most of a whole chunk.
template <class Acc>
[[gnu::noinline]] void exponentials(const Acc* x, Acc shift, Acc* e, std::int64_t count, Ahead next) {
  constexpr int kWidth = kPadding / 4;
  for (std::int64_t k = 0; k < count; k += kWidth) {
    const char* line = next.data + k * next.size;
    for (std::int64_t i = 0; i < kWidth * std::int64_t(sizeof(Acc)); i += kLine) __builtin_prefetch(line + i);
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) e[k + i] = math::exp_nonpositive(x[k + i] - shift);
  }
}

// Combines the lanes of a vector: one after the other, they would take longer than the rest of a short row.
template <class Value, int kWidth, class Combine>
[[gnu::always_inline]] inline Value by_halves(const Value (&values)[kWidth], Combine combine) {
  if constexpr (kWidth == 1) {
    return values[0];
  } else {
    Value halves[kWidth / 2];
    for (int i = 0; i < kWidth / 2; ++i) halves[i] = combine(values[i], values[i + kWidth / 2]);
    return by_halves(halves, combine);
  }
}

// The same of kPadding elements, which also adds their products with their gaps. kFinite: no gap is infinite, or the
// sum will be NaN.
template <bool kFinite, class Acc, int kWidth>
[[gnu::always_inline]] inline void exponentials_and_gaps(const Acc* x, Acc shift, Acc* e, double (&gaps)[kWidth]) {
  Acc four[kWidth] = {};  // added before they become float64
  for (std::int64_t k = 0; k < kPadding; k += kWidth) {
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) {
      const Acc shifted = x[k + i] - shift;
      e[k + i] = math::exp_nonpositive(shifted);
      four[i] += kFinite ? -(e[k + i] * shifted) : math::times_gap(e[k + i], shifted);
    }
  }
#pragma omp simd
  for (int i = 0; i < kWidth; ++i) gaps[i] += double(four[i]);
}

// Writes the exponentials, and returns the sum of their products with the gaps. The last kPadding elements may be
// padded with -inf; if there are others, all of it is done once more.
template <class Acc>
[[gnu::noinline]] double exponentials_and_gap(const Acc* x, Acc shift, Acc* e, std::int64_t count, Ahead next) {
  const auto sum = [](double a, double b) { return a + b; };
  const std::int64_t last = count - kPadding;
  double gaps[kPadding / 4] = {};
  for (std::int64_t k = 0; k < last; k += kPadding) {
    const char* line = next.data + k * next.size;
    for (std::int64_t i = 0; i < kPadding * next.size; i += kLine) __builtin_prefetch(line + i);
    exponentials_and_gaps<true>(x + k, shift, e + k, gaps);
  }
  exponentials_and_gaps<false>(x + last, shift, e + last, gaps);
  const double gap = by_halves(gaps, sum);
  if (gap == gap) return gap;
  std::fill_n(gaps, kPadding / 4, 0.0);
  for (std::int64_t k = 0; k < count; k += kPadding) exponentials_and_gaps<false>(x + k, shift, e + k, gaps);
  return by_halves(gaps, sum);
}

// The largest of a multiple of kPadding elements, found lane by lane: clang has no vector form of a reduction that
// passes over NaN.
template <class Acc>
[[gnu::noinline]] Acc largest(const Acc* x, std::int64_t count) {
  Acc lanes[kPadding / 4];
  std::fill_n(lanes, kPadding / 4, -math::kInfinity<Acc>);
  for (std::int64_t k = 0; k < count; k += kPadding / 4) {
#pragma omp simd
    for (int i = 0; i < kPadding / 4; ++i) lanes[i] = x[k + i] > lanes[i] ? x[k + i] : lanes[i];
  }
  return by_halves(lanes, [](Acc a, Acc b) { return b > a ? b : a; });
}

// The sum of a multiple of kPadding elements: one of each quarter are added as they are, and then in float64, since a
// float32 sum near 1 loses the digits that log(sum) consists of.
template <class Acc>
[[gnu::noinline]] double sum_of(const Acc* e, std::int64_t count) {
  constexpr int kWidth = kPadding / 4;
  const std::int64_t quarter = count / 4;
  double sums[kWidth] = {};
  for (std::int64_t k = 0; k < quarter; k += kWidth) {
    const Acc *first = e + k, *second = first + quarter, *third = second + quarter, *fourth = third + quarter;
#pragma omp simd
    for (int i = 0; i < kWidth; ++i) sums[i] += double((first[i] + second[i]) + (third[i] + fourth[i]));
  }
  return by_halves(sums, [](double a, double b) { return a + b; });
}

// The sum of exponentials of which the largest alone is 1, to all digits of the others: an entropy is little more than
// what they add up to.
template <class Acc>
[[gnu::noinline]] double sum_beside_one(const Acc* e, std::int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t k = 0; k < count; ++k) sum += e[k] < Acc(1) ? double(e[k]) : 0.0;
  return 1 + sum;
}

// The place of the first that fulfils a condition, or else count, which is a multiple of kPadding.
template <class Acc, class Condition>
[[gnu::noinline]] std::int64_t find_first(const Acc* x, std::int64_t count, Condition condition) {
  for (std::int64_t k = 0; k < count; k += kPadding) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int i = 0; i < kPadding; ++i) found |= condition(x[k + i]);
    if (!found) continue;
    while (!condition(x[k])) ++k;
    return k;
  }
  return count;
}

// The class of the largest logit so far, the first of several, where NaN is larger than any number.
template <class Acc>
struct Largest {
  Acc value = -math::kInfinity<Acc>;
  std::int64_t c = 0;

  // At a multiple of kPadding logits from class `first` on, of which max is the largest but for NaN.
  void look(const Acc* x, std::int64_t first, std::int64_t count, Acc max) {
    if (value != value) return;
    std::int64_t found = find_first(x, count, [](Acc x) { return x != x; });
    if (found < count) {
      max = x[found];
    } else if (max > value) {
      found = find_first(x, count, [max](Acc x) { return x == max; });
    } else {
      return;
    }
    value = max;
    c = first + found;
  }
};

// What is treated at once: a short row, or a chunk of a long one.
template <class Acc>
struct Part {
  int row;         // in the group
  std::int64_t c;  // its first class
  std::int64_t count;
  const Acc* x;
  Acc* e;  // the exponentials
  math::RowStatistics<Acc, true, double> statistics;
};

template <class Acc>
class Rows {
  using Statistics = math::RowStatistics<Acc, true, double>;

 public:
  explicit Rows(const CrossEntropyArgs& args)
      : p_(args),
        rows_at_once_(p_.classes <= kChunk && p_.cap == 0 ? kRowsAtOnce : 1),
        in_place_(p_.gradient && args.grad_logits.dtype == kDtypeOf<Acc> && args.grad_logits.class_stride == 1) {
    // Beside a gradient of another type, the exponentials; behind them the slopes under a cap, and each chunk's
    // maximum.
    const std::int64_t whole_chunks = p_.classes / kChunk;
    const std::int64_t kept = p_.gradient && !in_place_ ? whole_chunks * kChunk : 0;
    const std::int64_t slopes = p_.cap != 0 ? p_.classes : 0;
    kept_ = static_cast<Acc*>(scratch((kept + slopes + whole_chunks + 1) * sizeof(Acc)));
    slopes_ = kept_ + kept;
    chunk_max_ = slopes_ + slopes;
  }

  void count(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) p_.load_targets(group, partial);
  }

  void forward(std::int64_t begin, std::int64_t end, Partial& partial) const {
    Acc kept[kRowsAtOnce][kChunk];
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      p_.load_targets(group, partial);
      if (p_.gradient) p_.load_grads(group);
      for (int first = 0; first < group.count; first += rows_at_once_) {
        const int last = std::min(first + rows_at_once_, group.count);
        statistics(group, first, last, kept);
        for (int i = first; i < last && p_.gradient; ++i) {
          if (group.no_grad[i]) {
            zero_gradient(group, i);
            continue;
          }
          // The other logarithms are taken all at once.
          if (p_.problem.z_loss != 0) group.log_sum[i] = math::log(group.sum[i]);
          auto row = p_.template row_gradient<Sum::fresh>(p_.wide, group, i);
          if (p_.only_scaled()) row = row.through(p_.scale);
          for (std::int64_t c = 0; c < p_.classes; c += kChunk) {
            const Acc max = rows_at_once_ > 1 ? group.max[i] : chunk_max_[c / kChunk];
            const double factor = max == group.max[i] ? row.factor : math::rescale(row.factor, max, group.max[i]);
            gradient(group, i, c, place_of(group, first, i, c, kept), Acc(factor), row);
          }
        }
      }
      p_.finish(group, partial);
    }
  }

  void backward(std::int64_t begin, std::int64_t end) const {
    Partial unused;
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      p_.load_targets(group, unused);
      p_.load_statistics(group);
      p_.load_grads(group);
      p_.load_masses_of_all(group);
      for (int i = 0; i < group.count; ++i) {
        if (group.no_grad[i]) {
          zero_gradient(group, i);
          continue;
        }
        if (p_.problem.probabilities && !p_.args.row_mass) group.mass[i] = mass_of(group.begin + i);
        if (group.target[i] != Group<Acc>::kNoClass) group.target_logit[i] = logit(group.begin + i, group.target[i]);
        auto row = p_.template row_gradient<Sum::saved>(p_.wide, group, i);
        if (p_.args.grad_entropy) p_.add_entropy_grad(row, group, i);
        if (p_.only_scaled()) row = row.through(p_.scale);
        for (std::int64_t c = 0; c < p_.classes; c += kChunk) {
          Acc x_buffer[kChunk], e[kChunk];
          std::int64_t count = chunk_size(c);
          const Acc* x = logits(group.begin + i, c, count, x_buffer);
          if (p_.args.grad_probabilities.data) probability_gradient(group, i, c, x);
          if (!p_.gradient) continue;
          exponentials(x, group.max[i], e, count, ahead(group.begin + i, c));
          Acc factor = Acc(row.factor);
          if (p_.args.grad_entropy) {
            multiply_by_factors(x, group.max[i], e, count, row);
            factor = Acc(1);
          }
          gradient(group, i, c, e, factor, row);
        }
      }
    }
  }

 private:
  bool next_group(Group<Acc>& group, std::int64_t begin, std::int64_t end) const {
    group.begin = begin;
    group.count = static_cast<int>(std::min<std::int64_t>(end - begin, kLanes));
    return group.count > 0;
  }

  std::int64_t chunk_size(std::int64_t c) const { return std::min<std::int64_t>(kChunk, p_.classes - c); }

  // The logits of a chunk, as the softmax sees them. A ragged chunk is padded, and its count raised, with logits that
  // change nothing in a sum of exponentials, so that no exponential of a short row is computed alone.
  const Acc* logits(std::int64_t position, std::int64_t c, std::int64_t& count, Acc* buffer) const {
    const std::int64_t exist = count;
    const Acc* x = given_logits(position, c, count, buffer);
    if (!p_.args.transforms()) return x;
    p_.transform(x, buffer, slopes_ + c, exist);
    std::fill_n(buffer + exist, count - exist, -math::kInfinity<Acc>);
    return buffer;
  }

  // As they are.
  const Acc* given_logits(std::int64_t position, std::int64_t c, std::int64_t& count, Acc* buffer) const {
    const ClassTensor& tensor = p_.args.logits;
    const Acc* x = load(tensor.data, tensor.dtype, p_.offset(tensor, position, c), 1, count, buffer);
    if (count % kPadding == 0) return x;
    if (x != buffer) std::copy_n(x, count, buffer);
    const std::int64_t padded = ceil_div(count, kPadding) * kPadding;
    std::fill_n(buffer + count, padded - count, -math::kInfinity<Acc>);
    count = padded;
    return buffer;
  }

  // What follows a chunk: the next of its row, or a row behind those that are treated together.
  Ahead ahead(std::int64_t position, std::int64_t c) const {
    const ClassTensor& tensor = p_.args.logits;
    const std::int64_t size = size_of(tensor.dtype);
    const std::int64_t at =
        c + kChunk < p_.classes ? p_.offset(tensor, position, c + kChunk) : p_.offset(tensor, position + rows_at_once_);
    return {static_cast<const char*>(tensor.data) + at * size, size};
  }

  Acc logit(std::int64_t position, std::int64_t c) const {
    const ClassTensor& tensor = p_.args.logits;
    Acc x, slope;
    x = *load(tensor.data, tensor.dtype, p_.offset(tensor, position, c), 1, 1, &x);
    if (p_.args.transforms()) p_.transform(&x, &x, &slope, 1);
    return x;
  }

  // The weights of the classes from c on, for at most kChunk of them.
  const Acc* weights(std::int64_t c) const { return p_.weights ? p_.weights + c : kOnes<Acc>.data(); }

  const Acc* masses(std::int64_t position, std::int64_t c, Acc* buffer) const {
    const std::int64_t count = chunk_size(c);
    const ClassTensor& tensor = p_.args.probabilities;
    const Acc* q = load(tensor.data, tensor.dtype, p_.offset(tensor, position, c), tensor.class_stride, count, buffer);
    const Acc* w = weights(c);
#pragma omp simd
    for (std::int64_t k = 0; k < count; ++k) buffer[k] = math::probability_mass(p_.problem, q[k], w[k]);
    return buffer;
  }

  double mass_of(std::int64_t position) const {
    double mass = 0;
    for (std::int64_t c = 0; c < p_.classes; c += kChunk) {
      Acc buffer[kChunk];
      const Acc* a = masses(position, c, buffer);
      const std::int64_t count = chunk_size(c);
#pragma omp simd reduction(+ : mass)
      for (std::int64_t k = 0; k < count; ++k) mass += double(a[k]);
    }
    return mass;
  }

  // Where a part's exponentials lie until they become the gradient. Those of short rows and of ragged chunks, which are
  // the last of their row, are not written over before.
  Acc* place_of(const Group<Acc>& group, int first, int i, std::int64_t c, Acc (*kept)[kChunk]) const {
    if (!p_.gradient || rows_at_once_ > 1 || chunk_size(c) < kChunk) return kept[i - first];
    if (!in_place_) return kept_ + c;
    const ClassTensor& grad = p_.args.grad_logits;
    return static_cast<Acc*>(grad.data) + p_.offset(grad, group.begin + i, c);
  }

  // Finds the statistics of the rows [first, last), which are several short ones, or one. Short rows take each step
  // together: one after the other, each would wait for the end of its own reduction before its next step.
  void statistics(Group<Acc>& group, int first, int last, Acc (*kept)[kChunk]) const {
    Acc buffers[kRowsAtOnce][kChunk];
    Statistics row;
    Largest<Acc> largest_logits[kRowsAtOnce];
    for (int i = first; i < last; ++i) {
      group.max[i] = group.target_logit[i] = -math::kInfinity<Acc>;
      group.sum[i] = group.gap[i] = group.log_sum[i] = 0;
      // Before the exponentials may take its place.
      if (group.target[i] != Group<Acc>::kNoClass) group.target_logit[i] = logit(group.begin + i, group.target[i]);
    }
    int i = first;
    std::int64_t c = 0;
    while (i < last) {
      Part<Acc> parts[kRowsAtOnce];
      int count = 0;
      while (i < last && count < rows_at_once_) {
        if (group.skip[i] || c >= p_.classes) {
          ++i;
          c = 0;
          continue;
        }
        Part<Acc>& part = parts[count];
        part.row = i;
        part.c = c;
        part.count = chunk_size(c);
        part.x = logits(group.begin + i, c, part.count, buffers[count]);
        part.e = place_of(group, first, i, c, kept);
        part.statistics.max = largest(part.x, part.count);
        if (p_.args.argmax) look(largest_logits[i - first], group.begin + i, part);
        c += kChunk;
        ++count;
      }
      for (int k = 0; k < count; ++k) {
        Part<Acc>& part = parts[k];
        if (p_.problem.dense()) add_masses(group, part);
        const Acc shift = math::finite_shift(part.statistics.max);
        const Ahead next = ahead(group.begin + part.row, part.c);
        if (p_.entropy) {
          part.statistics.gap = exponentials_and_gap(part.x, shift, part.e, part.count, next);
        } else {
          exponentials(part.x, shift, part.e, part.count, next);
        }
      }
      for (int k = 0; k < count; ++k) merge(group, parts[k], row);
    }
    for (int k = first; k < last; ++k) {
      if (group.target[k] == Group<Acc>::kNoClass) group.target_logit[k] = group.max[k];
      if (p_.args.argmax) p_.args.argmax[group.begin + k] = largest_logits[k - first].c;
    }
  }

  // Where the softmax sees other logits, those that are given are read once more.
  void look(Largest<Acc>& largest_logit, std::int64_t position, const Part<Acc>& part) const {
    if (!p_.args.transforms()) return largest_logit.look(part.x, part.c, part.count, part.statistics.max);
    Acc buffer[kChunk];
    std::int64_t count = chunk_size(part.c);
    const Acc* x = given_logits(position, part.c, count, buffer);
    largest_logit.look(x, part.c, count, largest(x, count));
  }

  // What the masses that all classes have add to the loss, relative to the part's maximum, and their sum. Without
  // probabilities these are the class weights; the smoothing multiplies the sum over the row.
  void add_masses(const Group<Acc>& group, Part<Acc>& part) const {
    Acc buffer[kChunk];
    const Acc* a = p_.problem.probabilities ? masses(group.begin + part.row, part.c, buffer) : weights(part.c);
    const Acc* x = part.x;
    const Acc shift = math::finite_shift(part.statistics.max);
    const std::int64_t count = chunk_size(part.c);
    double loss = 0, mass = 0;
#pragma omp simd reduction(+ : loss, mass)
    for (std::int64_t k = 0; k < count; ++k) {
      loss += double(math::entry_loss_at_max(x[k] - shift, a[k]));
      mass += double(a[k]);
    }
    part.statistics.dense_loss = loss;
    part.statistics.mass = mass;
  }

  // Merges a part into the statistics of its row, of which `row` are those of the parts before it.
  void merge(Group<Acc>& group, Part<Acc>& part, Statistics& row) const {
    const int i = part.row;
    part.statistics.sum = sum_of(part.e, part.count);
    if (p_.entropy && part.statistics.sum >= 1 && part.statistics.sum < 2) {
      // One exponential is 1, and near it float32 loses what is added.
      part.statistics.sum = sum_beside_one(part.e, part.count);
    }
    if (rows_at_once_ == 1) chunk_max_[part.c / kChunk] = part.statistics.max;
    if (part.c == 0) row = part.statistics;
    if (part.c > 0) row.merge(part.statistics);
    group.max[i] = row.max;
    group.sum[i] = row.sum;
    group.gap[i] = row.gap;
    group.dense_loss[i] = row.dense_loss;
    group.mass[i] = row.mass;
  }

  void zero_gradient(const Group<Acc>& group, int i) const {
    const ClassTensor& tensor = p_.args.grad_logits;
    if (!p_.gradient) return;
    store_zeros(tensor.data, tensor.dtype, p_.offset(tensor, group.begin + i), tensor.class_stride, p_.classes);
  }

  // Where the entropy gives a gradient, each entry has a factor of its own.
  static void multiply_by_factors(const Acc* x, Acc max, Acc* e, std::int64_t count,
                                  const math::RowGradient<double>& row) {
    const Acc factor = Acc(row.factor), on_gap = Acc(row.on_gap);
#pragma omp simd
    for (std::int64_t k = 0; k < count; ++k) e[k] = math::times_factor(e[k], factor, on_gap, x[k] - max);
  }

  // A chunk's gradient from its exponentials, of which e may be the place.
  void gradient(const Group<Acc>& group, int i, std::int64_t c, const Acc* e, Acc factor,
                const math::RowGradient<double>& row) const {
    Acc buffer[kChunk], mass_buffer[kChunk];
    const ClassTensor& tensor = p_.args.grad_logits;
    const std::int64_t position = group.begin + i, count = chunk_size(c), at = p_.offset(tensor, position, c);
    Acc* grad = destination(tensor.data, tensor.dtype, at, tensor.class_stride, buffer);
    if (grad == buffer) prefetch_for_writing(tensor.data, tensor.dtype, at + count, count);
    if (p_.problem.dense()) {
      const Acc* a = p_.problem.probabilities ? masses(position, c, mass_buffer) : weights(c);
      const Acc on_all = Acc(row.on_all);
#pragma omp simd
      for (std::int64_t k = 0; k < count; ++k) grad[k] = math::logit_grad(e[k], factor, on_all * a[k]);
    } else {
#pragma omp simd
      for (std::int64_t k = 0; k < count; ++k) grad[k] = math::logit_grad(e[k], factor, Acc(0));
    }
    const std::int64_t t = std::int64_t(group.target[i]) - c;
    if (t >= 0 && t < count) {
      // In float64: p - 1 of a confident row keeps the digits that both numbers share.
      const double shifted = group.target_of(i).shifted, exponential = math::exp_nonpositive(shifted);
      const double on_all = p_.problem.dense() ? row.on_all * double(p_.weight(c + t)) : 0;
      const double softmax_grad = math::times_factor(exponential, row.factor, row.on_gap, shifted);
      grad[t] = Acc(softmax_grad - (on_all + row.on_target));
    }
    if (p_.cap != 0) {
      const Acc* slopes = slopes_ + c;
#pragma omp simd
      for (std::int64_t k = 0; k < count; ++k) grad[k] *= slopes[k];
    }
    store(tensor.data, tensor.dtype, at, tensor.class_stride, count, grad);
  }

  void probability_gradient(const Group<Acc>& group, int i, std::int64_t c, const Acc* x) const {
    Acc grad[kChunk];
    const ClassTensor& tensor = p_.args.grad_probabilities;
    const std::int64_t count = chunk_size(c);
    const Acc max = group.max[i], log_sum = Acc(group.log_sum[i]), g = group.grad_loss[i];
    const Acc* w = weights(c);
#pragma omp simd
    for (std::int64_t k = 0; k < count; ++k) {
      grad[k] = math::probability_grad(x[k] - max, log_sum, g, p_.problem.keep, w[k]);
    }
    store(tensor.data, tensor.dtype, p_.offset(tensor, group.begin + i, c), tensor.class_stride, count, grad);
  }

  const CrossEntropy<Acc> p_;
  const int rows_at_once_;
  const bool in_place_;  // the exponentials lie where the gradient will
  Acc* kept_;
  Acc* slopes_;
  Acc* chunk_max_;
};

}  // namespace
}  // namespace fusedloss::cpu
