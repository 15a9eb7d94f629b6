// Losses of one element on the CPU. A block of elements is loaded run by run into the accumulate type, the formula of
// `Loss` is applied in one vector loop, and the results are stored or added up. A formula is a struct of three
// functions: in_domain, evaluate (loss and slope) and target_grad (see csrc/math/bce.h). It knows nothing of dtypes,
// strides or broadcasts.

#include "../../math/reduction.h"
#include "../elementwise.h"
#include "blocks.h"
#include "cpu.h"
#include "memory.h"

namespace fusedloss::cpu {
namespace {

// Calls body(offset, stride, first, count) for the pieces of elements [begin, begin + count) that lie at one stride.
template <class F>
void for_each_piece(const ElementwiseShape& shape, const ElementwiseTensor& tensor, std::int64_t begin,
                    std::int64_t count, F body) {
  if (tensor.linear) return body(begin, std::int64_t(1), std::int64_t(0), count);
  const int last = shape.dims - 1;
  std::array<std::int64_t, kMaxDims> index{};
  std::int64_t offset = 0;
  for (int d = last, rest_is_done = 0; d >= 0 && !rest_is_done; --d) {
    index[d] = begin % shape.sizes[d];
    begin /= shape.sizes[d];
    offset += index[d] * tensor.strides[d];
    rest_is_done = begin == 0;
  }
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t piece = std::min(count - done, shape.sizes[last] - index[last]);
    body(offset, tensor.strides[last], done, piece);
    done += piece;
    offset += piece * tensor.strides[last];
    index[last] += piece;
    for (int d = last; d > 0 && index[d] == shape.sizes[d]; --d) {
      offset += tensor.strides[d - 1] - index[d] * tensor.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class Acc>
struct Run {
  const ElementwiseShape& shape;
  std::int64_t begin;
  std::int64_t count;

  // The tensor's elements, or ones where there is no tensor.
  const Acc* load(const ElementwiseTensor& tensor, Acc* buffer) const {
    if (!tensor.data) return kOnes<Acc>.data();
    // The next run, while this one is computed with: what is converted first would be waited for.
    if (tensor.linear && tensor.dtype != kDtypeOf<Acc>) {
      prefetch<false>(tensor.data, tensor.dtype, begin + count, count);
    }
    // One weight for each of a few columns: loaded once and repeated, since pieces that short cost more than they hold.
    const std::int64_t columns = shape.dims == 2 ? shape.sizes[1] : count;
    const bool repeats = !tensor.linear && tensor.strides[0] == 0 && columns < count;
    const std::int64_t distinct = repeats ? columns : count;
    const Acc* values = buffer;
    for_each_piece(shape, tensor, begin, distinct, [&](auto offset, auto stride, auto first, auto piece) {
      const Acc* loaded = cpu::load(tensor.data, tensor.dtype, offset, stride, piece, buffer + first);
      if (loaded == buffer + first) return;
      if (piece == distinct) {
        values = loaded;
      } else {
        std::copy_n(loaded, piece, buffer + first);
      }
    });
    if (!repeats) return values;
    if (values != buffer) std::copy_n(values, distinct, buffer);
    for (std::int64_t i = distinct; i < count; ++i) buffer[i] = buffer[i - distinct];
    return buffer;
  }

  // Elements that lie in memory as they are, if their type is T; or loaded.
  template <class T>
  const T* in_memory(const ElementwiseTensor& tensor, Acc* buffer) const {
    if constexpr (std::is_same_v<T, Acc>) {
      return load(tensor, buffer);
    } else {
      return static_cast<const T*>(tensor.data) + begin;
    }
  }

  // Where results that `store` will be given should be computed: in place when nothing has to be converted.
  Acc* destination(const ElementwiseTensor& tensor, Acc* buffer) const {
    return tensor.linear ? cpu::destination(tensor.data, tensor.dtype, begin, 1, buffer) : buffer;
  }

  void store(const ElementwiseTensor& tensor, const Acc* values) const {
    for_each_piece(shape, tensor, begin, count, [&](auto offset, auto stride, auto first, auto piece) {
      cpu::store(tensor.data, tensor.dtype, offset, stride, piece, values + first);
    });
  }
};

template <class Acc, class F>
void for_each_run(const ElementwiseArgs& args, std::int64_t block, F body) {
  const std::int64_t end = std::min(args.shape.numel, (block + 1) * kBlockElements);
  for (std::int64_t begin = block * kBlockElements; begin < end; begin += kElementwiseRun) {
    body(Run<Acc>{args.shape, begin, std::min<std::int64_t>(kElementwiseRun, end - begin)});
  }
}

// Equal to no target when nothing is to be ignored.
template <class Acc>
Acc ignored_target(const ElementwiseArgs& args) {
  return args.has_ignore_index ? static_cast<Acc>(args.ignore_index) : math::kNaN<Acc>;
}

// What a formula is applied to: a run of each input.
template <class Acc>
struct Operands {
  Acc x_buffer[kElementwiseRun], t_buffer[kElementwiseRun], w_buffer[kElementwiseRun], p_buffer[kElementwiseRun];
  const Acc *x, *t, *w, *p;

  void load(const Run<Acc>& run, const ElementwiseArgs& args) {
    x = run.load(args.input, x_buffer);
    t = run.load(args.target, t_buffer);
    w = run.load(args.weight, w_buffer);
    p = run.load(args.pos_weight, p_buffer);
  }
};

template <class Value>
struct Evaluated {
  Value loss, grad;
  Value counted, invalid;  // 1 or 0
};

// One element, or a vector of them. kPlain: none is ignored, and there are no weights.
template <class Loss, bool kPlain, class Value>
[[gnu::always_inline]] inline Evaluated<Value> evaluate(Value x, Value t, Value w, Value p, Value ignored,
                                                        Value grad_loss) {
  using math::select, math::zero_if;
  const Value one(1);
  constexpr bool kFast = !std::is_same_v<Value, double>;  // on the CPU the fast functions of float32 lose nothing
  const auto result = Loss::template evaluate<Value, kFast, !kPlain>(x, t, kPlain ? one : p);
  const auto inside = Loss::in_domain(x) & Loss::in_domain(t);
  if constexpr (kPlain) {
    return {result.loss, grad_loss * result.slope, one, zero_if(inside, one)};
  } else {
    const auto is_ignored = t == ignored;
    return {zero_if(is_ignored, w * result.loss), zero_if(is_ignored, grad_loss * w * result.slope),
            zero_if(is_ignored, one), zero_if(is_ignored, zero_if(inside, one))};
  }
}

template <class Acc>
struct RunTotal {
  Acc loss = 0;
  Acc counted = 0, invalid = 0;  // exact in a run, and as wide as the values: a loop of one width
};

// What a run's elements become, beside their sum.
enum class Stored { nothing, losses, gradients };

// Vectors that take each step together: as many as the formula's constants leave registers for.
template <class Loss>
inline constexpr int kTogether = 1;
template <>
inline constexpr int kTogether<math::BceWithLogits> = 2;

// Evaluates a run. Input and results have a type T, the target U: the accumulate type, or half precision, which is
// converted on its way between memory and registers. A function of its own: inlined into the traversal, GCC 12 leaves
// the loop scalar.
template <class Loss, Stored kStored, bool kPlain, class T, class U, class Acc>
[[gnu::noinline]] RunTotal<Acc> evaluate_run(const T* x, const U* t, const Acc* w, const Acc* p, std::int64_t count,
                                             Acc ignored, Acc grad_loss, T* results) {
  RunTotal<Acc> total;
  std::int64_t done = 0;
#if FUSEDLOSS_VECTORS
  if constexpr (std::is_same_v<Acc, float>) {
    using V = FloatVectors<kTogether<Loss>>;
    V sum(0), counted(0), invalid(0);
    for (; done + V::kLanes <= count; done += V::kLanes) {
      const V weight = kPlain ? V(1) : V::load(w + done), pos_weight = kPlain ? V(1) : V::load(p + done);
      const Evaluated<V> result = evaluate<Loss, kPlain>(load_vectors<V>(x + done), load_vectors<V>(t + done), weight,
                                                         pos_weight, V(ignored), V(grad_loss));
      sum = sum + result.loss;
      counted = counted + result.counted;
      invalid = invalid + result.invalid;
      if constexpr (kStored == Stored::losses) store_vectors(result.loss, results + done);
      if constexpr (kStored == Stored::gradients) store_vectors(result.grad, results + done);
    }
    total = {sum.sum(), kPlain ? Acc(done) : counted.sum(), invalid.sum()};
  }
#endif
  Acc sum = 0, counted = 0, invalid = 0;
#pragma omp simd reduction(+ : sum, counted, invalid)
  for (std::int64_t i = done; i < count; ++i) {
    const Evaluated<Acc> result =
        evaluate<Loss, kPlain>(convert<Acc>(x[i]), convert<Acc>(t[i]), w[i], p[i], ignored, grad_loss);
    sum += result.loss;
    counted += result.counted;
    invalid += result.invalid;
    if constexpr (kStored == Stored::losses) results[i] = round_to<T>(result.loss);
    if constexpr (kStored == Stored::gradients) results[i] = round_to<T>(result.grad);
  }
  return {total.loss + sum, total.counted + counted, total.invalid + invalid};
}

template <class Loss>
void elementwise_forward(const ElementwiseArgs& args, Partial* partials, std::int64_t first_block,
                         std::int64_t last_block) {
  const ElementwiseTensor& results = args.grad_input.data ? args.grad_input : args.loss;
  const Stored stored = args.grad_input.data ? Stored::gradients : args.loss.data ? Stored::losses : Stored::nothing;

  // Those of types T and U lie in memory as they are needed.
  const auto traverse = [&]<class T, class U, class Acc, bool kPlain>() {
    const Acc ignored = ignored_target<Acc>(args);
    double one;  // grad_loss, for all elements
    const double* g = load_positions({args.grad_loss.data, args.grad_loss.dtype, 0}, 0, 1, &one);
    const Acc grad_loss = static_cast<Acc>(*g * math::mean_scale(args.grad_divisor));
    const auto evaluate = [&] {
      switch (stored) {
        case Stored::nothing: return evaluate_run<Loss, Stored::nothing, kPlain, T, U, Acc>;
        case Stored::losses: return evaluate_run<Loss, Stored::losses, kPlain, T, U, Acc>;
        case Stored::gradients: return evaluate_run<Loss, Stored::gradients, kPlain, T, U, Acc>;
      }
      __builtin_unreachable();
    }();
    Acc x_buffer[kElementwiseRun], t_buffer[kElementwiseRun], w_buffer[kElementwiseRun], p_buffer[kElementwiseRun];
    Acc buffer[kElementwiseRun];
    for (std::int64_t block = first_block; block < last_block; ++block) {
      Partial& partial = partials[block];
      for_each_run<Acc>(args, block, [&](const Run<Acc>& run) {
        const T* x = run.template in_memory<T>(args.input, x_buffer);
        const U* t = run.template in_memory<U>(args.target, t_buffer);
        const Acc *w = run.load(args.weight, w_buffer), *p = run.load(args.pos_weight, p_buffer);
        T* found = nullptr;
        if constexpr (std::is_same_v<T, Acc>) {
          if (stored != Stored::nothing) found = run.destination(results, buffer);
        } else if (stored != Stored::nothing) {
          found = static_cast<T*>(results.data) + run.begin;
        }
        const RunTotal<Acc> total = evaluate(x, t, w, p, run.count, ignored, grad_loss, found);
        if constexpr (std::is_same_v<T, Acc>) {
          if (found) run.store(results, found);
        }
        partial.loss += double(total.loss);
        partial.divisor += double(total.counted);
        if (total.invalid > 0 && partial.invalid < 0) partial.invalid = run.begin;
      });
    }
  };

  const bool plain = !args.has_ignore_index && !args.weight.data && !args.pos_weight.data;
  const auto choose = [&]<class T, class U, class Acc>() {
    plain ? traverse.template operator()<T, U, Acc, true>() : traverse.template operator()<T, U, Acc, false>();
  };
  const Dtype dtype = args.input.dtype;
  const bool is_linear = args.input.linear && (stored == Stored::nothing || (results.linear && results.dtype == dtype));
  const bool same_target = args.target.linear && args.target.dtype == dtype;
  const auto choose_half = [&]<class T>() {
    same_target ? choose.template operator()<T, T, float>() : choose.template operator()<T, float, float>();
  };
  if (is_linear && dtype == Dtype::bfloat16) return choose_half.template operator()<BFloat16>();
  if (is_linear && dtype == Dtype::float16) return choose_half.template operator()<Float16>();
  with_accumulate(args.dtype, [&]<class Acc>() { choose.template operator()<Acc, Acc, Acc>(); });
}

// The gradient of a run's input, for a grad_output of each element.
template <class Loss, class Acc>
[[gnu::noinline]] void gradient_run(const Operands<Acc>& in, const Acc* g, std::int64_t count, Acc ignored, Acc scale,
                                    Acc* grad) {
  const auto gradient = [=]<class V>(V x, V t, V w, V p, V g) __attribute__((always_inline)) {
    using math::zero_if;
    constexpr bool kFast = !std::is_same_v<V, double>;
    return zero_if(t == V(ignored), g * V(scale) * w * Loss::template evaluate<V, kFast>(x, t, p).slope);
  };
  const Acc *x = in.x, *t = in.t, *w = in.w, *p = in.p;
  std::int64_t done = 0;
#if FUSEDLOSS_VECTORS
  if constexpr (std::is_same_v<Acc, float>) {
    using V = FloatVectors<kTogether<Loss>>;
    for (; done + V::kLanes <= count; done += V::kLanes) {
      gradient(V::load(x + done), V::load(t + done), V::load(w + done), V::load(p + done), V::load(g + done))
          .store(grad + done);
    }
  }
#endif
#pragma omp simd
  for (std::int64_t i = done; i < count; ++i) grad[i] = gradient(x[i], t[i], w[i], p[i], g[i]);
}

template <class Loss>
void elementwise_backward(const ElementwiseArgs& args, Partial*, std::int64_t first_block, std::int64_t last_block) {
  with_accumulate(args.dtype, [&]<class Acc>() {
    const Acc ignored = ignored_target<Acc>(args);
    const Acc scale = static_cast<Acc>(math::mean_scale(args.grad_divisor));
    Operands<Acc> in;
    Acc g_buffer[kElementwiseRun], grad_buffer[kElementwiseRun];
    for (std::int64_t block = first_block; block < last_block; ++block) {
      for_each_run<Acc>(args, block, [&](const Run<Acc>& run) {
        in.load(run, args);
        const Acc *x = in.x, *t = in.t, *w = in.w, *p = in.p;
        const Acc* g = run.load(args.grad_loss, g_buffer);
        if (args.grad_input.data) {
          Acc* grad = run.destination(args.grad_input, grad_buffer);
          gradient_run<Loss>(in, g, run.count, ignored, scale, grad);
          run.store(args.grad_input, grad);
        }
        if (args.grad_target.data) {
          Acc* grad = run.destination(args.grad_target, grad_buffer);
#pragma omp simd
          for (std::int64_t i = 0; i < run.count; ++i) {
            const Acc slope = Loss::target_grad(x[i], t[i], p[i], g[i] * scale * w[i]);
            grad[i] = math::zero_if(t[i] == ignored, slope);
          }
          run.store(args.grad_target, grad);
        }
      });
    }
  });
}

// How many elements are not ignored: the divisor of the mean.
inline void elementwise_count(const ElementwiseArgs& args, Partial* partials, std::int64_t first_block,
                              std::int64_t last_block) {
  with_accumulate(args.dtype, [&]<class Acc>() {
    const Acc ignored = ignored_target<Acc>(args);
    Acc buffer[kElementwiseRun];
    for (std::int64_t block = first_block; block < last_block; ++block) {
      for_each_run<Acc>(args, block, [&](const Run<Acc>& run) {
        const Acc* t = run.load(args.target, buffer);
        Acc counted = 0;
#pragma omp simd reduction(+ : counted)
        for (std::int64_t i = 0; i < run.count; ++i) counted += t[i] == ignored ? Acc(0) : Acc(1);
        partials[block].divisor += double(counted);
      });
    }
  });
}

}  // namespace
}  // namespace fusedloss::cpu
