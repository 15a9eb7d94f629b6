// Part of cross_entropy.inl: row order, where the classes of a position lie side by side.
//
// A row is read once, in chunks: each is loaded, its maximum is found and its exponentials, relative to that maximum,
// are added up and kept. When the row's own maximum is known the kept exponentials become the gradient: a factor for
// each chunk, minus the target's masses. They are kept where the gradient will lie if it has the accumulate type, else
// in scratch memory; either way they are still in the second-level cache.
//
// Rows that are short take each step together. What a row needs beside its entries (a logarithm, a quotient, the
// target's own gradient) is found for all of them in one vector loop, and no row waits for the end of its own sum.

namespace fusedloss::cpu {
namespace {

// What stands at p: a number, or a vector.
template <class Value, class Acc>
[[gnu::always_inline]] inline Value at(const Acc* p) {
  if constexpr (std::is_same_v<Value, Acc>) {
    return *p;
  } else {
    return Value::load(p);
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

inline constexpr auto kPlus = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
inline constexpr auto kLarger = [](auto a, auto b) __attribute__((always_inline)) { return b > a ? b : a; };

// What is found of a row before its lanes are combined; short rows combine theirs together. Without vectors, one.
#if FUSEDLOSS_VECTORS
template <class Acc>
inline constexpr bool kHasVectors = std::is_same_v<Acc, float>;
template <class Acc>
using Largests = std::conditional_t<kHasVectors<Acc>, Floats, Acc>;
template <class Acc>
using Sums = std::conditional_t<kHasVectors<Acc>, Doubles, double>;
#else
template <class Acc>
inline constexpr bool kHasVectors = false;
template <class Acc>
using Largests = Acc;
template <class Acc>
using Sums = double;
#endif

// result[i]: the lanes of the i-th of kWidest rows combined.
template <class Lanes, class Value, class Combine>
[[gnu::always_inline]] inline void combine_lanes(const Lanes (&rows)[kWidest], Value* result, Combine combine) {
  if constexpr (std::is_same_v<Lanes, Value>) {
    std::copy_n(rows, kWidest, result);
  } else {
    constexpr int kTogether = sizeof(Lanes) / sizeof(Value);
    for (int i = 0; i < kWidest; i += kTogether) {
      Lanes some[kTogether];
      for (int j = 0; j < kTogether; ++j) some[j] = rows[i + j];
      const Lanes combined = each_by_halves(some, combine);
      std::memcpy(result + i, &combined, sizeof(combined));
    }
  }
}

template <class Lanes, class Combine>
[[gnu::always_inline]] inline auto combine_lanes(const Lanes& lanes, Combine combine) {
  if constexpr (std::is_floating_point_v<Lanes>) {
    return lanes;
  } else {
    return by_halves(lanes, combine);
  }
}

// The largest of a multiple of kWidest numbers, found lane by lane: clang has no vector form of a reduction that passes
// over NaN. Four vectors at a time, since each waits for what the one before has found in its lanes.
template <class Acc>
[[gnu::noinline]] Acc largest_number(const Acc* x, std::int64_t count) {
  Acc lanes[4 * kWidest];
  std::fill_n(lanes, 4 * kWidest, -math::kInfinity<Acc>);
  std::int64_t k = 0;
  for (; k + 4 * kWidest <= count; k += 4 * kWidest) {
#pragma omp simd
    for (int i = 0; i < 4 * kWidest; ++i) lanes[i] = x[k + i] > lanes[i] ? x[k + i] : lanes[i];
  }
  for (; k < count; k += kWidest) {
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) lanes[i] = x[k + i] > lanes[i] ? x[k + i] : lanes[i];
  }
  return by_halves(lanes, kLarger);
}

// The largest of `count` logits of a row as they lie in memory. Those that cannot stay there are written to e: all
// where they have another type, else the last group if it is ragged. It is padded with logits that change nothing in a
// sum of exponentials, so that no exponential is computed alone.
template <class T, class Acc>
[[gnu::noinline]] Largests<Acc> load_largest(const T* x, std::int64_t count, Acc* e) {
  constexpr bool kConverts = !std::is_same_v<T, Acc>;
  const std::int64_t whole = count / kWidest * kWidest;
#if FUSEDLOSS_VECTORS
  if constexpr (kHasVectors<Acc>) {
    constexpr int kVector = FloatVector::kLanes;
    Largests<Acc> most[4];
    const auto look = [&](int i, Floats found, std::int64_t k, bool stores) __attribute__((always_inline)) {
      if (stores) std::memcpy(e + k, &found, sizeof(found));
      most[i] = found > most[i] ? found : most[i];
    };
    const auto look_at = [&](int i, std::int64_t k) __attribute__((always_inline)) {
      look(i, load_vectors<FloatVector>(x + k).part[0], k, kConverts);
    };
    unrolled<4>([&](int i) { most[i] = Largests<Acc>{} - math::kInfinity<Acc>; });
    std::int64_t k = 0;
    for (; k + 4 * kVector <= whole; k += 4 * kVector) unrolled<4>([&](int i) { look_at(i, k + i * kVector); });
    for (; k < whole; k += kVector) look_at(0, k);
    for (int i = 0; whole < count && i < kWidest / kVector; ++i, k += kVector) {
      look(i, load_row_end(x + k, count - k, Floats{} - math::kInfinity<Acc>), k, true);
    }
    return kLarger(kLarger(most[0], most[1]), kLarger(most[2], most[3]));
  }
#endif
  const std::int64_t written = kConverts ? 0 : whole, padded = ceil_div(count, kWidest) * kWidest;
  load_each(e + written, count - written, x + written);
  std::fill(e + count, e + padded, -math::kInfinity<Acc>);
  Acc largest = largest_number(e + written, padded - written);
  if constexpr (!kConverts) largest = kLarger(largest_number(x, whole), largest);
  if constexpr (!kHasVectors<Acc>) return largest;
}

// The sum of a multiple of kWidest entries: four are added as they are, and then in float64, since a float32 sum near 1
// loses the digits that log(sum) consists of. An entry is a number, or as many as a vector has.
template <class Acc, class Entry>
[[gnu::always_inline]] inline Sums<Acc> add_lanes(std::int64_t count, Entry entry) {
#if FUSEDLOSS_VECTORS
  if constexpr (kHasVectors<Acc>) {
    using V = FloatVector;
    constexpr int kParts = kWidest / V::kLanes;
    WideSums sums[kParts];
    const auto part = [&](std::int64_t k, int i)
                          __attribute__((always_inline)) { return entry.template operator()<V>(k + i * V::kLanes); };
    unrolled<kParts>([&](int i) { sums[i].add(part(0, i)); });
    std::int64_t k = kWidest;
    for (; k + 4 * kWidest <= count; k += 4 * kWidest) {
      unrolled<kParts>([&](int i) {
        sums[i].add((part(k, i) + part(k + kWidest, i)) + (part(k + 2 * kWidest, i) + part(k + 3 * kWidest, i)));
      });
    }
    for (; k < count; k += kWidest) unrolled<kParts>([&](int i) { sums[i].add(part(k, i)); });
    if constexpr (kParts == 1) {
      return sums[0].low + sums[0].high;
    } else {
      return (sums[0].low + sums[1].low) + (sums[0].high + sums[1].high);
    }
  }
#endif
  const auto number = [&](std::int64_t k) __attribute__((always_inline)) { return entry.template operator()<Acc>(k); };
  double sums[kWidest];
#pragma omp simd
  for (int i = 0; i < kWidest; ++i) sums[i] = double(number(i));  // rather than zeros: GCC has a slow way to write some
  std::int64_t k = kWidest;
  for (; k + 4 * kWidest <= count; k += 4 * kWidest) {
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) {
      const std::int64_t at = k + i;
      sums[i] += double((number(at) + number(at + kWidest)) + (number(at + 2 * kWidest) + number(at + 3 * kWidest)));
    }
  }
  for (; k < count; k += kWidest) {
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) sums[i] += double(number(k + i));
  }
  if constexpr (!kHasVectors<Acc>) return by_halves(sums, kPlus);
}

template <class Acc, class Entry>
[[gnu::always_inline]] inline double add(std::int64_t count, Entry entry) {
  return combine_lanes(add_lanes<Acc>(count, entry), kPlus);
}

template <class Acc>
[[gnu::noinline]] Sums<Acc> sums_of(const Acc* e, std::int64_t count) {
  return add_lanes<Acc>(count, [=]<class V>(std::int64_t k) __attribute__((always_inline)) { return at<V>(e + k); });
}

// The sum of the exponentials' products with their gaps.
template <class Acc>
[[gnu::noinline]] double gap_of(const Acc* x, Acc shift, const Acc* e, std::int64_t count) {
  return add<Acc>(count, [=]<class V>(std::int64_t k) __attribute__((always_inline)) {
    return math::times_gap(at<V>(e + k), at<V>(x + k) - V(shift));
  });
}

// A group of which only the first `count` are in memory, and the others have a value of their own.
template <class Acc>
[[gnu::always_inline]] inline void load_first(const Acc* x, std::int64_t count, Acc* group, Acc others) {
#if FUSEDLOSS_VECTORS
  if constexpr (kHasVectors<Acc>) {
    for (int i = 0; i < kWidest; i += FUSEDLOSS_LANES) {
      const Floats padded = load_first(x + i, count - i, FloatVector(others).part[0]);
      std::memcpy(group + i, &padded, sizeof(padded));
    }
    return;
  }
#endif
  if (x != group) std::copy_n(x, count, group);
  std::fill(group + count, group + kWidest, others);
}

// What masses on all classes add to the loss, relative to a maximum. A quarter of each is added, so that four of the
// largest numbers are one.
template <class Acc>
[[gnu::noinline]] Sums<Acc> dense_losses(const Acc* x, const Acc* masses, Acc shift, std::int64_t count) {
  const auto quarter = [=]<class V>(V x, V mass) __attribute__((always_inline)) {
    return math::entry_loss_at_max(x - V(shift), V(0.25f) * mass);
  };
  const std::int64_t whole = count / kWidest * kWidest;
  Sums<Acc> sums{};
  if (whole > 0) {
    sums = add_lanes<Acc>(whole, [=]<class V>(std::int64_t k) __attribute__((always_inline)) {
      return quarter(at<V>(x + k), at<V>(masses + k));
    });
  }
  if (whole < count) {
    Acc rest[kWidest], rest_masses[kWidest];
    load_first(x + whole, count - whole, rest, shift);
    load_first(masses + whole, count - whole, rest_masses, Acc(0));
    sums += add_lanes<Acc>(kWidest, [&]<class V>(std::int64_t k) __attribute__((always_inline)) {
      return quarter(at<V>(rest + k), at<V>(rest_masses + k));
    });
  }
  return 4 * sums;
}

// From exponentials to gradients: where the target alone has mass, and where all classes have.
template <class T, class Acc>
[[gnu::noinline]] void write_gradient(const Acc* e, Acc factor, T* grad, std::int64_t count) {
  store_each(grad, count,
             [=](std::int64_t k) __attribute__((always_inline)) { return math::logit_grad(e[k], factor, Acc(0)); });
}
template <class T, class Acc>
[[gnu::noinline]] void write_gradient(const Acc* e, Acc factor, T* grad, std::int64_t count, Acc on_all,
                                      const Acc* masses) {
  store_each(grad, count, [=](std::int64_t k) __attribute__((always_inline)) {
    return math::logit_grad(e[k], factor, on_all * masses[k]);
  });
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

// The place of the first that fulfils a condition, or else count, which is a multiple of kWidest.
template <class Acc, class Condition>
[[gnu::noinline]] std::int64_t find_first(const Acc* x, std::int64_t count, Condition condition) {
  for (std::int64_t k = 0; k < count; k += kWidest) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int i = 0; i < kWidest; ++i) found |= condition(x[k + i]);
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

  // At a multiple of kWidest logits from class `first` on, of which max is the largest but for NaN.
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

  // Of later classes.
  void merge(const Largest& later) {
    if (value == value && (later.value > value || later.value != later.value)) *this = later;
  }
};

// What is treated at once: a short row, or a chunk of a long one. Its logits are x[0, whole), and what is no whole
// group lies padded at e[whole, padded), until the exponentials take the place.
template <class Acc>
struct Part {
  int row;                     // in the group
  std::int64_t c;              // its first class
  std::int64_t count;          // of its classes
  std::int64_t whole, padded;  // multiples of kWidest
  const Acc* x;
  Acc* e;  // the exponentials
};

template <class Acc>
class Rows {
  using Statistics = math::RowStatistics<Acc, true, double>;

 public:
  // chunk_max: of all chunks of a row, if its segments share them.
  explicit Rows(const CrossEntropyArgs& args, Acc* chunk_max = nullptr)
      : p_(args),
        width_(ceil_div(p_.classes, kWidest) * kWidest),
        chunks_(ceil_div(p_.classes, kChunk)),
        // Under a cap, one: the slopes are kept, too.
        rows_at_once_(p_.cap != 0 ? 1 : std::clamp<std::int64_t>(kBlockElements / width_, 1, kLanes)),
        as_they_are_(args.logits.dtype == kDtypeOf<Acc> && !args.transforms()),
        // Under a cap, another thread would lack the slopes of the exponentials that it finds there.
        in_place_(p_.gradient && args.grad_logits.dtype == kDtypeOf<Acc> && args.grad_logits.class_stride == 1 &&
                  !(chunk_max && p_.cap != 0)) {
    const std::int64_t slopes = p_.cap != 0 ? p_.classes : 0;
    const std::int64_t shared = slopes + rows_at_once_ * (width_ + chunks_);
    kept_ = static_cast<Acc*>(scratch((shared + 1) * sizeof(Acc) + chunks_ * sizeof(double)));
    slopes_ = kept_ + rows_at_once_ * width_;
    chunk_max_ = chunk_max ? chunk_max : slopes_ + slopes;
    chunk_mass_ = reinterpret_cast<double*>(kept_ + shared + shared % 2);
    const bool spreads = p_.problem.dense() && !p_.problem.probabilities;
    for (std::int64_t c = 0; spreads && c < p_.classes; c += kChunk) {
      chunk_mass_[c / kChunk] = mass_of(weights(c), std::min<std::int64_t>(kChunk, p_.classes - c));
    }
  }

  void count(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) p_.load_targets(group, partial);
  }

  void forward(std::int64_t begin, std::int64_t end, Partial& partial) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      p_.load_targets(group, partial);
      statistics(group);
      p_.finish(group, partial);
      if (!p_.gradient) continue;
      p_.load_grads(group);
      const Gradients rows = gradients<Sum::fresh>(group);
      for (int i = 0; i < group.count; ++i) write_gradient_of<Sum::fresh>(group, i, 0, p_.classes, rows);
    }
  }

  void backward(std::int64_t begin, std::int64_t end) const {
    for (Group<Acc> group; next_group(group, begin, end); begin += group.count) {
      load_for_backward(group);
      const Gradients rows = gradients<Sum::saved>(group);
      for (int i = 0; i < group.count; ++i) write_gradient_of<Sum::saved>(group, i, 0, p_.classes, rows);
    }
  }

  // Row after row: all threads take segments of each, and meet for what its entries share. Forward, or backward if
  // partial is null.
  static void split(const CrossEntropyArgs& args, Partial* partial, void* shared, ParallelFor parallel_for) {
    static_assert(sizeof(Found) <= kFoundBytes);
    const std::int64_t segments = ceil_div(args.shape.classes, kSegment);
    Found* found = static_cast<Found*>(shared);
    Acc* chunk_max = reinterpret_cast<Acc*>(static_cast<char*>(shared) + segments * kFoundBytes);
    Rows(args, chunk_max).split(partial, found, segments, parallel_for);
  }

 private:
  // What is found of a row, or of some of its classes.
  struct Found {
    Statistics statistics;
    Largest<Acc> largest_logit;

    void merge(const Found& later) {
      statistics.merge(later.statistics);
      largest_logit.merge(later.largest_logit);
    }
  };

  void split(Partial* partial, Found* found, std::int64_t segments, ParallelFor parallel_for) const {
    Group<Acc> group;
    group.count = 1;
    for (group.begin = 0; group.begin < p_.args.shape.positions(); ++group.begin) {
      if (partial) {
        p_.load_targets(group, *partial);
        begin_rows(group);
        const auto find = [&](std::int64_t begin, std::int64_t end) {
          const Rows rows(p_.args, chunk_max_);
          for (std::int64_t i = begin; i < end; ++i)
            found[i] = rows.find(group, 0, i * kSegment, (i + 1) * kSegment, false);
        };
        if (!group.skip[0]) {
          parallel_for(segments, Work::of(find));
          for (std::int64_t i = 1; i < segments; ++i) found[0].merge(found[i]);
          end_row(group, 0, found[0]);
        }
        p_.finish(group, *partial);
        p_.load_grads(group);
      } else {
        load_for_backward(group);
      }
      if (!p_.gradient && !p_.args.grad_probabilities.data) continue;
      const Gradients shared = partial ? gradients<Sum::fresh>(group) : gradients<Sum::saved>(group);
      const auto write = [&](std::int64_t begin, std::int64_t end) {
        const Rows rows(p_.args, chunk_max_);
        const std::int64_t first = begin * kSegment, last = std::min(p_.classes, end * kSegment);
        partial ? rows.template write_gradient_of<Sum::fresh>(group, 0, first, last, shared, true)
                : rows.template write_gradient_of<Sum::saved>(group, 0, first, last, shared);
      };
      parallel_for(segments, Work::of(write));
    }
  }

  // What the entries of each row share, and the target's own, which is formed in float64: p - 1 of a confident row
  // keeps the digits that both numbers share.
  struct Gradients {
    Shared<double> shared;
    Acc on_target_class[kLanes];
  };

  bool next_group(Group<Acc>& group, std::int64_t begin, std::int64_t end) const {
    group.begin = begin;
    group.count = static_cast<int>(std::min<std::int64_t>(end - begin, rows_at_once_));
    return group.count > 0;
  }

  // The part of row i that begins at class c, and where its exponentials lie until they become the gradient: in scratch
  // memory, of which all chunks have the first, unless they are kept. What ends in a ragged group lies there, too:
  // padded, it would reach beyond its row.
  Part<Acc> part_of(const Group<Acc>& group, int i, std::int64_t c, bool kept) const {
    const std::int64_t position = group.begin + i, count = std::min<std::int64_t>(kChunk, p_.classes - c);
    const std::int64_t padded = ceil_div(count, kWidest) * kWidest, whole = count / kWidest * kWidest;
    Acc* e = kept_ + i * width_ + (kept ? c : 0);
    if (in_place_ && whole == padded) {
      e = static_cast<Acc*>(p_.args.grad_logits.data) + p_.offset(p_.args.grad_logits, position, c);
    }
    if (!as_they_are_) return {i, c, count, padded, padded, e, e};
    const ClassTensor& tensor = p_.args.logits;
    return {i, c, count, whole, padded, static_cast<const Acc*>(tensor.data) + p_.offset(tensor, position, c), e};
  }

  // Loads a part's logits, as the softmax sees them, where they do not lie as they are needed. A ragged group is padded
  // with logits that change nothing in a sum of exponentials, so that no exponential is computed alone.
  void load_logits(const Part<Acc>& part, std::int64_t position) const {
    const std::int64_t whole = part.count / kWidest * kWidest;
    const Acc* rest = part.x + whole;
    if (!as_they_are_) {
      const ClassTensor& tensor = p_.args.logits;
      const Acc* x = load(tensor.data, tensor.dtype, p_.offset(tensor, position, part.c), 1, part.count, part.e);
      if (p_.args.transforms()) p_.transform(x, part.e, slopes_ + part.c, part.count);
    }
    if (whole < part.count) load_first(rest, part.count - whole, part.e + whole, -math::kInfinity<Acc>);
  }

  // Replaces a part's logits by their exponentials.
  void take_exponentials(const Part<Acc>& part, Acc shift, std::int64_t position) const {
    Acc shifts[kWidest];
    std::fill_n(shifts, kWidest, shift);
    exponentials<true>(part.x, shifts, part.e, kWidest, part.whole / kWidest, ahead(position, part.c));
    if (part.whole == part.padded) return;
    Acc* rest = part.e + part.whole;
    exponentials<false>(rest, shifts, rest, kWidest, 1);
  }

  // What follows a part: the next chunk of its row, or a row behind those that are treated together.
  Ahead ahead(std::int64_t position, std::int64_t c) const {
    const ClassTensor& tensor = p_.args.logits;
    const std::int64_t size = size_of(tensor.dtype);
    const std::int64_t at =
        c + kChunk < p_.classes ? p_.offset(tensor, position, c + kChunk) : p_.offset(tensor, position + rows_at_once_);
    return {static_cast<const char*>(tensor.data) + at * size, kWidest * size};
  }

  Acc logit(std::int64_t position, std::int64_t c) const {
    const ClassTensor& tensor = p_.args.logits;
    Acc x, slope;
    with_floating(tensor.dtype, [&]<class T>() {
      x = convert<Acc>(static_cast<const T*>(tensor.data)[p_.offset(tensor, position, c)]);
    });
    if (p_.args.transforms()) p_.transform(&x, &x, &slope, 1);
    return x;
  }

  // The weights of the classes from c on, for at most kChunk of them.
  const Acc* weights(std::int64_t c) const { return p_.weights ? p_.weights + c : kOnes<Acc>.data(); }

  const Acc* masses(std::int64_t position, std::int64_t c, std::int64_t count, Acc* buffer) const {
    if (!p_.problem.probabilities) return weights(c);
    const ClassTensor& tensor = p_.args.probabilities;
    const Acc* q = load(tensor.data, tensor.dtype, p_.offset(tensor, position, c), tensor.class_stride, count, buffer);
    const Acc* w = weights(c);
#pragma omp simd
    for (std::int64_t k = 0; k < count; ++k) buffer[k] = math::probability_mass(p_.problem, q[k], w[k]);
    return buffer;
  }

  static double mass_of(const Acc* masses, std::int64_t count) {
    double mass = 0;
#pragma omp simd reduction(+ : mass)
    for (std::int64_t k = 0; k < count; ++k) mass += double(masses[k]);
    return mass;
  }

  double mass_of(std::int64_t position) const {
    double mass = 0;
    for (std::int64_t c = 0; c < p_.classes; c += kChunk) {
      Acc buffer[kChunk];
      const std::int64_t count = std::min<std::int64_t>(kChunk, p_.classes - c);
      mass += mass_of(masses(position, c, count, buffer), count);
    }
    return mass;
  }

  // The maximum of the chunk that begins at class c, of row i.
  Acc& max_of_chunk(int i, std::int64_t c) const { return chunk_max_[i * chunks_ + c / kChunk]; }

  void statistics(Group<Acc>& group) const {
    begin_rows(group);
    if (chunks_ == 1) return statistics_of_short(group);
    for (int j = 0; j < group.taken_count; ++j) {
      const int i = group.taken[j];
      // In segments, as by many threads: how many rows there are must not decide how one is added up.
      Found found = find(group, i, 0, kSegment, p_.gradient);
      for (std::int64_t c = kSegment; c < p_.classes; c += kSegment) {
        found.merge(find(group, i, c, c + kSegment, p_.gradient));
      }
      end_row(group, i, found);
    }
  }

  // Rows of one chunk, kWidest at a time: the lanes of their maxima are combined together, and then those of their
  // sums.
  void statistics_of_short(Group<Acc>& group) const {
    for (int first = 0; first < group.taken_count; first += kWidest) {
      const int *taken = group.taken + first, count = std::min(kWidest, group.taken_count - first);
      Largests<Acc> largests[kWidest];
      Sums<Acc> sums[kWidest], dense[kWidest];
      std::fill(largests + count, largests + kWidest, Largests<Acc>{});
      std::fill(sums + count, sums + kWidest, Sums<Acc>{});
      std::fill(dense + count, dense + kWidest, Sums<Acc>{});
      for (int j = 0; j < count; ++j) {
        const Part<Acc> part = part_of(group, taken[j], 0, true);
        // Under a transformation those that are given, whose place those that the softmax sees may take.
        if (p_.args.argmax && p_.args.transforms()) find_argmax(group, part, -math::kInfinity<Acc>);
        largests[j] = largest_lanes_of(part, group.begin + part.row);
      }
      Acc max[kWidest];
      combine_lanes(largests, max, kLarger);
      for (int j = 0; j < count; ++j) {
        const Part<Acc> part = part_of(group, taken[j], 0, true);
        if (p_.args.argmax && !p_.args.transforms()) find_argmax(group, part, max[j]);
        const Lanes found = lanes_of(part, group.begin + part.row, max[j]);
        sums[j] = found.sum;
        dense[j] = found.dense_loss;
        group.gap[part.row] = found.gap;
        group.mass[part.row] = found.mass;
      }
      double sum[kWidest], dense_loss[kWidest];
      combine_lanes(sums, sum, kPlus);
      if (p_.problem.dense()) combine_lanes(dense, dense_loss, kPlus);
      for (int j = 0; j < count; ++j) {
        const int i = taken[j];
        group.max[i] = max[j];
        group.sum[i] = sum[j];
        if (p_.problem.dense()) group.dense_loss[i] = dense_loss[j];
        if (group.target[i] == Group<Acc>::kNoClass) group.target_logit[i] = max[j];
      }
    }
    for (int j = 0; p_.entropy && j < group.taken_count; ++j) {
      const int i = group.taken[j];
      group.sum[i] = rich_sum(part_of(group, i, 0, true), group.sum[i]);
    }
  }

  void find_argmax(const Group<Acc>& group, const Part<Acc>& part, Acc max) const {
    Largest<Acc> found;
    look(found, group.begin + part.row, part, max);
    p_.args.argmax[group.begin + part.row] = found.c;
  }

  // What rows have that are not read; which are, so that no branch guesses it again at every step; and the targets'
  // logits, before the exponentials may take their place.
  void begin_rows(Group<Acc>& group) const {
    const int count = group.count;
    std::fill_n(group.max, count, -math::kInfinity<Acc>);
    std::fill_n(group.target_logit, count, -math::kInfinity<Acc>);
    for (double* statistic : {group.sum, group.gap, group.dense_loss, group.mass}) std::fill_n(statistic, count, 0.0);
    if (p_.args.argmax) std::fill_n(p_.args.argmax + group.begin, count, 0);
    group.taken_count = 0;
    for (int i = 0; i < count; ++i) {
      group.taken[group.taken_count] = i;
      group.taken_count += group.skip[i] == 0;
    }
    for (int j = 0; j < group.taken_count; ++j) {
      const int i = group.taken[j];
      if (group.target[i] != Group<Acc>::kNoClass) group.target_logit[i] = logit(group.begin + i, group.target[i]);
    }
  }

  void end_row(Group<Acc>& group, int i, const Found& found) const {
    assign(group, i, found.statistics);
    if (p_.args.argmax) p_.args.argmax[group.begin + i] = found.largest_logit.c;
  }

  static void assign(Group<Acc>& group, int i, const Statistics& row) {
    group.max[i] = row.max;
    group.sum[i] = row.sum;
    group.gap[i] = row.gap;
    group.dense_loss[i] = row.dense_loss;
    group.mass[i] = row.mass;
    if (group.target[i] == Group<Acc>::kNoClass) group.target_logit[i] = row.max;
  }

  // Of the chunks of row i that begin at [first, last).
  Found find(const Group<Acc>& group, int i, std::int64_t first, std::int64_t last, bool kept) const {
    Found found;
    for (std::int64_t c = first; c < std::min(last, p_.classes); c += kChunk) {
      const Part<Acc> part = part_of(group, i, c, kept);
      const Acc max = maximum(part, group.begin + i, found.largest_logit);
      max_of_chunk(i, c) = max;
      found.statistics.merge(statistics_of(part, group.begin + i, max));
    }
    return found;
  }

  // Loads a part, and returns the largest of its logits, as the softmax sees them.
  Acc maximum(const Part<Acc>& part, std::int64_t position, Largest<Acc>& largest_logit) const {
    // Of those that are given: what the softmax sees may take their place.
    const bool transforms = p_.args.transforms();
    if (p_.args.argmax && transforms) look(largest_logit, position, part, -math::kInfinity<Acc>);
    const Acc max = combine_lanes(largest_lanes_of(part, position), kLarger);
    if (p_.args.argmax && !transforms) look(largest_logit, position, part, max);
    return max;
  }

  Largests<Acc> largest_lanes_of(const Part<Acc>& part, std::int64_t position) const {
    if (p_.args.transforms()) {
      load_logits(part, position);
      return load_largest(part.e, part.padded, part.e);
    }
    const ClassTensor& tensor = p_.args.logits;
    return with_floating(tensor.dtype, [&]<class T>() {
      if constexpr (std::is_same_v<T, Acc> || (kIsHalf<T> && std::is_same_v<Acc, float>)) {
        const T* x = static_cast<const T*>(tensor.data) + p_.offset(tensor, position, part.c);
        return load_largest(x, part.count, part.e);
      }
      __builtin_unreachable();
      return Largests<Acc>{};
    });
  }

  // The first of the largest logits, as they are given: where the softmax sees others, they are read by themselves.
  void look(Largest<Acc>& largest_logit, std::int64_t position, const Part<Acc>& part, Acc max) const {
    Acc buffer[kChunk];
    const ClassTensor& tensor = p_.args.logits;
    const Acc* x = load(tensor.data, tensor.dtype, p_.offset(tensor, position, part.c), 1, part.count, buffer);
    std::copy_n(x, x == buffer ? 0 : part.count, buffer);
    std::fill(buffer + part.count, buffer + part.padded, -math::kInfinity<Acc>);
    if (p_.args.transforms()) max = combine_lanes(load_largest(buffer, part.padded, buffer), kLarger);
    largest_logit.look(buffer, part.c, part.padded, max);
  }

  // Replaces a part's logits by their exponentials, and returns its statistics.
  Statistics statistics_of(const Part<Acc>& part, std::int64_t position, Acc max) const {
    const Lanes lanes = lanes_of(part, position, max);
    Statistics found;
    found.max = max;
    found.sum = combine_lanes(lanes.sum, kPlus);
    if (p_.entropy) found.sum = rich_sum(part, found.sum);
    found.gap = lanes.gap;
    found.dense_loss = combine_lanes(lanes.dense_loss, kPlus);
    found.mass = lanes.mass;
    return found;
  }

  // The same, where the lanes of sums are not combined yet.
  struct Lanes {
    Sums<Acc> sum, dense_loss{};
    double gap = 0, mass = 0;
  };
  Lanes lanes_of(const Part<Acc>& part, std::int64_t position, Acc max) const {
    Lanes found;
    const Acc shift = math::finite_shift(max);
    if (p_.problem.dense()) add_masses(found, part, position, shift);
    Acc logits[kChunk];  // the exponentials may take their place
    if (p_.entropy) std::copy(part.e + part.whole, part.e + part.padded, std::copy_n(part.x, part.whole, logits));
    take_exponentials(part, shift, position);
    if (p_.entropy) found.gap = gap_of(logits, shift, part.e, part.padded);
    found.sum = sums_of(part.e, part.padded);
    return found;
  }

  // A part's sum, as exact as an entropy needs it: one exponential is 1, and near it float32 loses what is added.
  static double rich_sum(const Part<Acc>& part, double sum) {
    return sum >= 1 && sum < 2 ? sum_beside_one(part.e, part.padded) : sum;
  }

  // What the masses that all classes have add to the loss, relative to the part's maximum, and their sum. Without
  // probabilities these are the class weights; the smoothing multiplies the sum over the row.
  void add_masses(Lanes& found, const Part<Acc>& part, std::int64_t position, Acc shift) const {
    Acc buffer[kChunk];
    const Acc* a = masses(position, part.c, part.count, buffer);
    found.dense_loss = dense_losses(part.x, a, shift, part.count);
    found.mass = p_.problem.probabilities ? mass_of(a, part.count) : chunk_mass_[part.c / kChunk];
  }

  void zero_gradient(const Group<Acc>& group, int i, std::int64_t first, std::int64_t last) const {
    const ClassTensor& tensor = p_.args.grad_logits;
    if (!p_.gradient) return;
    store_zeros(tensor.data, tensor.dtype, p_.offset(tensor, group.begin + i, first), tensor.class_stride,
                last - first);
  }

  template <Sum kSum>
  Gradients gradients(Group<Acc>& group) const {
    Gradients rows;
    const int padded = p_.template share<kSum>(group, rows.shared);
    if (p_.problem.probabilities) return rows;
    double weight[kLanes];
    std::fill_n(weight, padded, 0.0);
    for (int i = 0; i < group.count && p_.problem.dense(); ++i) {
      if (group.target[i] != Group<Acc>::kNoClass) weight[i] = double(p_.weight(group.target[i]));
    }
    const Shared<double>& shared = rows.shared;
#pragma omp simd
    for (int i = 0; i < padded; ++i) {
      const double shifted = double(group.target_logit[i]) - double(group.max[i]);
      const double exponential = math::exp_nonpositive(shifted);
      const double softmax_grad = math::times_factor(exponential, shared.factor[i], shared.on_gap[i], shifted);
      rows.on_target_class[i] = Acc(softmax_grad - (shared.on_all[i] * weight[i] + shared.on_target[i]));
    }
    return rows;
  }

  void load_for_backward(Group<Acc>& group) const {
    Partial unused;
    p_.load_targets(group, unused);
    p_.load_statistics(group);
    p_.load_grads(group);
    p_.load_masses_of_all(group);
    for (int i = 0; i < group.count; ++i) {
      group.target_logit[i] = group.max[i];
      if (group.no_grad[i]) continue;
      if (p_.problem.probabilities && !p_.args.row_mass) group.mass[i] = mass_of(group.begin + i);
      if (group.target[i] != Group<Acc>::kNoClass) group.target_logit[i] = logit(group.begin + i, group.target[i]);
    }
  }

  // The gradient of row i, of the chunks that begin at [first, last). In forward the exponentials are where they were
  // left, unless another thread did that: then only those that lie in the gradient's place.
  template <Sum kSum>
  void write_gradient_of(const Group<Acc>& group, int i, std::int64_t first, std::int64_t last, const Gradients& rows,
                         bool by_another = false) const {
    if (group.no_grad[i]) return zero_gradient(group, i, first, last);
    for (std::int64_t c = first; c < last; c += kChunk) {
      const Part<Acc> part = part_of(group, i, c, kSum == Sum::fresh && !by_another);
      const bool in_scratch = !in_place_ || part.count % kWidest != 0;
      if (kSum == Sum::saved || (by_another && in_scratch)) {
        backward(part, group, rows);
        continue;
      }
      const Acc max = chunks_ > 1 ? max_of_chunk(i, c) : group.max[i];
      const double factor = rows.shared.factor[i];
      gradient(group, part, max == group.max[i] ? factor : math::rescale(factor, max, group.max[i]), rows);
    }
  }

  // A part of the gradient in backward, where the statistics are known.
  void backward(const Part<Acc>& part, const Group<Acc>& group, const Gradients& rows) const {
    const std::int64_t position = group.begin + part.row;
    const Acc max = group.max[part.row];
    load_logits(part, position);
    if (p_.args.grad_probabilities.data) probability_gradient(group, part);
    if (!p_.gradient) return;
    double factor = rows.shared.factor[part.row];
    if (p_.args.grad_entropy) {
      take_weighted_exponentials(part, max, Acc(factor), Acc(rows.shared.on_gap[part.row]));
      factor = 1;
    } else {
      take_exponentials(part, max, position);
    }
    gradient(group, part, factor, rows);
  }

  // Where the entropy gives a gradient, each entry has a factor of its own.
  void take_weighted_exponentials(const Part<Acc>& part, Acc max, Acc factor, Acc on_gap) const {
    const auto take = [&](const Acc* x, Acc* e, std::int64_t count) {
#pragma omp simd
      for (std::int64_t k = 0; k < count; ++k) {
        const Acc shifted = x[k] - max;
        e[k] = math::times_factor(math::exp_nonpositive(shifted), factor, on_gap, shifted);
      }
    };
    take(part.x, part.e, part.whole);
    take(part.e + part.whole, part.e + part.whole, part.padded - part.whole);
  }

  // A part's gradient from its exponentials, of which e may be the place.
  void gradient(const Group<Acc>& group, const Part<Acc>& part, double row_factor, const Gradients& rows) const {
    const ClassTensor& tensor = p_.args.grad_logits;
    const std::int64_t position = group.begin + part.row, at = p_.offset(tensor, position, part.c);
    const Acc factor = Acc(row_factor), on_all = Acc(rows.shared.on_all[part.row]);
    Acc mass_buffer[kChunk];
    const auto write = [&]<class T>(T* grad) {
      if (!p_.problem.dense()) return write_gradient(part.e, factor, grad, part.count);
      write_gradient(part.e, factor, grad, part.count, on_all, masses(position, part.c, part.count, mass_buffer));
    };
    const std::int64_t t = std::int64_t(group.target[part.row]) - part.c;
    const bool has_target = t >= 0 && t < part.count;
    if (tensor.class_stride == 1 && p_.cap == 0) {
      with_floating(tensor.dtype, [&]<class T>() {
        T* grad = static_cast<T*>(tensor.data) + at;
        if (!in_place_) prefetch<true>(tensor.data, tensor.dtype, at + part.count, part.count);
        write(grad);
        if (has_target) grad[t] = round_to<T>(rows.on_target_class[part.row]);
      });
      return;
    }
    Acc grad[kChunk];
    write(grad);
    if (has_target) grad[t] = rows.on_target_class[part.row];
    for (std::int64_t k = 0; k < part.count && p_.cap != 0; ++k) grad[k] *= slopes_[part.c + k];
    store(tensor.data, tensor.dtype, at, tensor.class_stride, part.count, grad);
  }

  void probability_gradient(const Group<Acc>& group, const Part<Acc>& part) const {
    Acc grad[kChunk];
    const ClassTensor& tensor = p_.args.grad_probabilities;
    const int i = part.row;
    const Acc max = group.max[i], log_sum = Acc(group.log_sum[i]), g = group.grad_loss[i];
    const Acc *x = part.x, *w = weights(part.c);
#pragma omp simd
    for (std::int64_t k = 0; k < part.count; ++k) {
      grad[k] = math::probability_grad(x[k] - max, log_sum, g, p_.problem.keep, w[k]);
    }
    store(tensor.data, tensor.dtype, p_.offset(tensor, group.begin + i, part.c), tensor.class_stride, part.count, grad);
  }

  const CrossEntropy<Acc> p_;
  const std::int64_t width_;   // the classes, padded
  const std::int64_t chunks_;  // of a row
  const std::int64_t rows_at_once_;
  const bool as_they_are_;  // the logits in memory are those that are needed
  const bool in_place_;     // the exponentials lie where the gradient will
  Acc* kept_;               // (rows_at_once_, width_)
  Acc* slopes_;
  Acc* chunk_max_;      // (rows_at_once_, chunks_)
  double* chunk_mass_;  // (chunks_,) of the class weights
};

}  // namespace
}  // namespace fusedloss::cpu
