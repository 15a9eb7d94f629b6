// Losses of one element on the device: a stream of packets. A formula is a struct of three functions, as on the CPU:
// in_domain, evaluate (loss and slope) and target_grad (csrc/math/bce.h).
//
// Where input, target and results lie in one piece, packets of 16 bytes of the input are in hand at once, and as many
// elements of the target. Weights may go with them: one for each column or each element. Anything else (strides, labels
// in rare types, a gradient to the target) takes the general kernel, whose operands may each have a type and strides of
// their own.

#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "device_assert.cuh"
#include "reduce.cuh"
#include "workspace.h"

namespace fusedloss::cuda {

inline constexpr int kElementwiseThreads = 256;
// Packets of input and target that a thread asks for before it waits. Factors take the registers of a second one, and
// their arithmetic the time of a load.
template <bool kFactors>
inline constexpr int kPacketsInFlight = kFactors ? 1 : 2;
// Packets (or elements) whose losses are added up in the accumulate type.
inline constexpr int kAddedTogether = 16;
// Up to this many elements every block counts for itself those that are not ignored.
inline constexpr std::int64_t kElementsCountedInline = 16384;

// Where the number that belongs to an element lies.
enum class Walk {
  number,    // there is only one, or none
  columns,   // at its place in the last dimension
  elements,  // at its place in all of them
  other
};

struct ElementwiseRun {
  GridSums grid;
  double divisor = 0;               // of the mean, where no element is ignored
  const double* counted = nullptr;  // of the mean, where a launch has counted it

  Walk weight = Walk::other, pos_weight = Walk::other, grad_loss = Walk::other;
  unsigned columns = 1;  // of the last dimension, where a number of a column is needed
  bool packets = false;  // packets of all operands are aligned where the input's are, and cross no row's end
};

// Sums of a thread: some losses in the accumulate type, and all of them in float64, which most devices are slow at.
template <class Acc>
class ElementSums {
 public:
  __device__ __forceinline__ void add(Acc loss, int counted) {
    loss_ += loss;
    counted_ += counted;
  }
  __device__ __forceinline__ void flush() {
    all_.add({static_cast<double>(loss_), static_cast<double>(counted_)});
    loss_ = Acc(0);
    counted_ = 0;
  }
  __device__ __forceinline__ const Sums& total() const { return all_; }

 private:
  Acc loss_ = Acc(0);
  int counted_ = 0;
  Sums all_;
};

// A division of 64 bits takes several times as long as one of 32.
__device__ __forceinline__ std::int64_t divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

// Where an element of the merged shape lies in operands with strides of their own.
template <int kOperands>
struct Offsets {
  std::int64_t at[kOperands];

  template <class... Operands>
  __device__ __forceinline__ Offsets(const ElementwiseShape& shape, std::int64_t element, const Operands&... operands)
      : at{(operands.linear ? element : 0)...} {
    if (((operands.linear || !operands.data) && ...)) return;
    std::int64_t rest = element;
#pragma unroll 1
    for (int d = shape.dims - 1; d >= 0; --d) {
      const std::int64_t quotient = divide(rest, shape.sizes[d]), index = rest - quotient * shape.sizes[d];
      int i = 0;
      ((at[i++] += operands.linear ? 0 : index * operands.strides[d]), ...);
      rest = quotient;
    }
  }
};
template <class... Operands>
Offsets(const ElementwiseShape&, std::int64_t, const Operands&...) -> Offsets<sizeof...(Operands)>;

// Not inlined: nine types at each of its uses would make most of the general kernels' code.
template <class Acc>
__device__ __noinline__ Acc load_any(const void* data, Dtype dtype, std::int64_t offset) {
  return data ? load<Acc>(data, dtype, offset) : Acc(1);
}

// How many elements are not ignored, of those that one of `threads` threads looks at. Target: void where it may have
// any type and strides.
template <class Target, class Acc>
__device__ __forceinline__ double count_elements(const ElementwiseArgs& args, Acc ignored, std::int64_t thread,
                                                 std::int64_t threads) {
  int counted = 0;
  if constexpr (std::is_void_v<Target>) {
    for (std::int64_t e = thread; e < args.shape.numel; e += threads) {
      const Offsets in(args.shape, e, args.target);
      counted += load_any<Acc>(args.target.data, args.target.dtype, in.at[0]) != ignored;
    }
  } else {
    constexpr int kInFlight = 4;
    const Span<const Target> targets(static_cast<const Target*>(args.target.data), args.shape.numel);
    if (thread < targets.singles) counted += convert<Acc>(targets.data[targets.single(thread)]) != ignored;
    for (std::int64_t p = thread; p < targets.packets; p += kInFlight * threads) {
      Packet<Target> packets[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (p + k * threads < targets.packets) packets[k] = targets.load(p + k * threads);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (p + k * threads >= targets.packets) break;
        Acc t[targets.kWidth];
        packets[k].unpack(t);
#pragma unroll
        for (const Acc target : t) counted += target != ignored;
      }
    }
  }
  return counted;
}

// What elements in packets and any others share.
template <class Loss, class T, class Target, Pass kPass>
class Elementwise {
 public:
  // To be called by all threads of the block.
  __device__ __forceinline__ Elementwise(const ElementwiseArgs& args, const ElementwiseRun& run)
      : args_(args),
        run_(run),
        ignored_(args.has_ignore_index ? static_cast<Acc>(args.ignore_index) : math::kNaN<Acc>),
        one_grad_loss_(kPass == Pass::forward_with_gradient || run.grad_loss == Walk::number) {
    double scale = 1;
    if constexpr (kPass == Pass::backward) {
      scale = math::mean_scale(args.grad_divisor);
    } else if constexpr (kPass == Pass::forward_with_gradient) {
      if (args.total.reduction == Reduction::mean) {
        const double divisor = run.counted ? *run.counted : args.has_ignore_index ? counted() : run.divisor;
        scale = math::mean_scale(&divisor);
      }
    }
    const ElementwiseTensor& grad_loss = args.grad_loss;
    if (kPass != Pass::forward && grad_loss.data && one_grad_loss_)
      scale *= load_floating<double>(grad_loss.data, grad_loss.dtype, 0);
    scale_ = static_cast<Acc>(scale);
  }

 protected:
  using Acc = Accumulate<T>;

  template <bool kWeighted>
  __device__ __forceinline__ static math::LossAndSlope<Acc> evaluate(Acc x, Acc t, Acc pos_weight) {
    return Loss::template evaluate<Acc, sizeof(T) == 2, kWeighted>(x, t, pos_weight);
  }

  const ElementwiseArgs& args_;
  const ElementwiseRun& run_;
  const Acc ignored_;         // equal to no target where nothing is to be ignored
  const bool one_grad_loss_;  // all losses have one gradient, which is in the scale
  Acc scale_;

 private:
  // The elements that are not ignored. By a whole block.
  __device__ __forceinline__ double counted() const {
    Sums sums;
    sums.divisor = count_elements<Target>(args_, ignored_, threadIdx.x, blockDim.x);
    return block_sum_for_all(sums).divisor;
  }
};

// --- In packets -----------------------------------------------------------------------------------------------

// A place in the last dimension that moves on by one distance again and again, without a division.
class Column {
 public:
  __device__ __forceinline__ Column(unsigned columns, std::int64_t first, std::int64_t distance)
      : columns_(columns), distance_(remainder(distance)), at_(remainder(first)) {}

  __device__ __forceinline__ unsigned at() const { return at_; }
  __device__ __forceinline__ void advance() {
    at_ += distance_;
    if (at_ >= columns_) at_ -= columns_;
  }

 private:
  __device__ __forceinline__ unsigned remainder(std::int64_t element) const {
    return static_cast<unsigned>(element - divide(element, columns_) * columns_);
  }

  const unsigned columns_, distance_;
  unsigned at_;
};

// What multiplies losses or gradients: 1 where absent. Packets are of the input's type, single elements of that or of
// the accumulate type, and one number of any.
template <class T, bool kPresent>
class Factor {
  using Acc = Accumulate<T>;

 public:
  __device__ __forceinline__ Factor(const ElementwiseTensor& tensor, Walk walk, Dtype input_dtype)
      : data_(tensor.data),
        walk_(walk),
        as_input_(tensor.dtype == input_dtype),
        number_(kPresent && walk == Walk::number ? load_any<Acc>(tensor.data, tensor.dtype, 0) : Acc(1)) {}

  template <int N>
  __device__ __forceinline__ void load(std::int64_t first, unsigned column, Acc (&values)[N]) const {
    if (!kPresent || walk_ == Walk::number) {
#pragma unroll
      for (Acc& value : values) value = kPresent ? number_ : Acc(1);
      return;
    }
    const std::int64_t at = walk_ == Walk::columns ? column : first;
    if (N > 1 || as_input_) {
      load_cached<N>(static_cast<const T*>(data_) + at).unpack(values);
    } else {
      values[0] = static_cast<const Acc*>(data_)[at];
    }
  }

 private:
  const void* const data_;
  const Walk walk_;
  const bool as_input_;
  const Acc number_;
};

// kFactors: there are weights, or gradients of each loss.
template <class Loss, class T, class Target, bool kFactors, Pass kPass>
class ElementwisePackets : Elementwise<Loss, T, Target, kPass> {
  using Base = Elementwise<Loss, T, Target, kPass>;
  using Base::args_, Base::run_, Base::ignored_, Base::one_grad_loss_, Base::scale_;
  using typename Base::Acc;
  static constexpr int kWidth = kPacketOf<T>;

 public:
  __device__ __forceinline__ ElementwisePackets(const ElementwiseArgs& args, const ElementwiseRun& run)
      : Base(args, run),
        weight_(args.weight, run.weight, args.dtype),
        pos_weight_(args.pos_weight, run.pos_weight, args.dtype),
        grad_loss_(one_grad_loss_ ? ElementwiseTensor{} : args.grad_loss, run.grad_loss, args.dtype) {}

  // A body of packets, and what is before it and behind it; or single elements alone.
  __device__ __forceinline__ void process() const {
    const std::int64_t numel = args_.shape.numel;
    const Span<const T> inputs(static_cast<const T*>(args_.input.data), numel);
    const std::int64_t packets = run_.packets ? inputs.packets : 0, body = packets * kWidth;
    ElementSums<Acc> sums;
    stream<kWidth>(packets, [&](std::int64_t p) { return inputs.head + p * kWidth; }, sums);
    stream<1>(numel - body, [&](std::int64_t i) { return i < inputs.head ? i : i + body; }, sums);
    if constexpr (kPass != Pass::backward) add_up(run_.grid, args_.total, blockIdx.x, sums.total());
  }

 private:
  // `count` packets of N elements. A thread's lie a block's width apart.
  template <int N, class First>
  __device__ __forceinline__ void stream(std::int64_t count, First first_of, ElementSums<Acc>& sums) const {
    constexpr int kInFlight = kPacketsInFlight<kFactors>, kApart = kElementwiseThreads;
    const std::int64_t step = std::int64_t(gridDim.x) * kInFlight * kApart;
    std::int64_t next = std::int64_t(blockIdx.x) * kInFlight * kApart + threadIdx.x;
    if (next >= count) return;
    static_assert(!kFactors || kInFlight == 1, "packets of a thread lie in different columns");
    Column column(run_.columns, first_of(next), step * N);
    while (next < count) {
      for (int turn = 0; turn < kAddedTogether / kInFlight && next < count; ++turn, next += step) {
        const std::int64_t first = first_of(next);
        const T* const inputs = static_cast<const T*>(args_.input.data) + first;
        const Target* const targets = static_cast<const Target*>(args_.target.data) + first;
        Packet<T, N> x[kInFlight];
        Packet<Target, N> t[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (next + k * kApart >= count) break;
          x[k] = load_streaming<N>(inputs + k * kApart * N);
          t[k] = load_streaming<N>(targets + k * kApart * N);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (next + k * kApart >= count) break;
          process(first + k * kApart * N, column.at(), x[k], t[k], sums);
        }
        column.advance();
      }
      sums.flush();
    }
  }

  template <int N>
  __device__ __forceinline__ void process(std::int64_t first, unsigned column, const Packet<T, N>& inputs,
                                          const Packet<Target, N>& targets, ElementSums<Acc>& sums) const {
    Acc x[N], t[N], w[N], p[N], g[N];
    inputs.unpack(x);
    targets.unpack(t);
    weight_.load(first, column, w);
    pos_weight_.load(first, column, p);
    grad_loss_.load(first, column, g);

    Acc losses[N], grads[N];
    int counted = N;
    bool valid = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      valid &= int(t[i] == ignored_) | (int(Loss::in_domain(x[i])) & int(Loss::in_domain(t[i])));
      const auto result = Base::template evaluate<kFactors>(x[i], t[i], p[i]);
      losses[i] = w[i] * result.loss;
      grads[i] = g[i] * scale_ * w[i] * result.slope;
    }
    device_assert(valid);
    if (args_.has_ignore_index) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool ignored = t[i] == ignored_;
        losses[i] = math::zero_if(ignored, losses[i]);
        grads[i] = math::zero_if(ignored, grads[i]);
        counted -= ignored;
      }
    }
    Acc loss = losses[0];
#pragma unroll
    for (int i = 1; i < N; ++i) loss += losses[i];
    sums.add(loss, counted);
    if constexpr (kPass != Pass::forward) {
      store_streaming(static_cast<T*>(args_.grad_input.data) + first, Packet<T, N>::pack(grads));
    } else if (args_.loss.data) {
      store_streaming(static_cast<T*>(args_.loss.data) + first, Packet<T, N>::pack(losses));
    }
  }

  const Factor<T, kFactors> weight_, pos_weight_;
  const Factor<T, kFactors && kPass == Pass::backward> grad_loss_;
};

// --- Anything else ----------------------------------------------------------------------------------------------

template <class Loss, class T, Pass kPass>
class AnyElements : Elementwise<Loss, T, void, kPass> {
  using Base = Elementwise<Loss, T, void, kPass>;
  using Base::args_, Base::run_, Base::ignored_, Base::one_grad_loss_, Base::scale_;
  using typename Base::Acc;

 public:
  using Base::Base;

  __device__ __forceinline__ void process() const {
    const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
    ElementSums<Acc> sums;
    for (std::int64_t e = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < args_.shape.numel;) {
      for (int turn = 0; turn < kAddedTogether && e < args_.shape.numel; ++turn, e += step) process(e, sums);
      sums.flush();
    }
    if constexpr (kPass != Pass::backward) add_up(run_.grid, args_.total, blockIdx.x, sums.total());
  }

 private:
  __device__ __forceinline__ void process(std::int64_t element, ElementSums<Acc>& sums) const {
    const Offsets in(args_.shape, element, args_.input, args_.target, args_.weight, args_.pos_weight, args_.grad_loss);
    const Acc x = convert<Acc>(static_cast<const T*>(args_.input.data)[in.at[0]]);
    const Acc t = load_any<Acc>(args_.target.data, args_.target.dtype, in.at[1]);
    const Acc w = load_any<Acc>(args_.weight.data, args_.weight.dtype, in.at[2]);
    const Acc p = load_any<Acc>(args_.pos_weight.data, args_.pos_weight.dtype, in.at[3]);
    const Acc g = one_grad_loss_ ? Acc(1) : load_any<Acc>(args_.grad_loss.data, args_.grad_loss.dtype, in.at[4]);
    const bool counts = t != ignored_;
    device_assert(!counts || (Loss::in_domain(x) && Loss::in_domain(t)));
    const auto result = Base::template evaluate<true>(x, t, p);
    const Acc loss = math::zero_if(!counts, w * result.loss);
    sums.add(loss, counts);

    const Offsets out(args_.shape, element, args_.loss, args_.grad_input, args_.grad_target);
    if (kPass != Pass::backward && args_.loss.data) store(args_.loss.data, args_.loss.dtype, out.at[0], loss);
    if (kPass != Pass::forward && args_.grad_input.data) {
      const Acc grad = math::zero_if(!counts, g * scale_ * w * result.slope);
      static_cast<T*>(args_.grad_input.data)[out.at[1]] = convert<T>(grad);
    }
    if (kPass == Pass::backward && args_.grad_target.data) {
      const Acc grad = math::zero_if(!counts, Loss::target_grad(x, t, p, g * scale_ * w));
      store(args_.grad_target.data, args_.grad_target.dtype, out.at[2], grad);
    }
  }
};

// --- Kernels ------------------------------------------------------------------------------------------------------

// Blocks that registers must leave room for. Two packets of input and target take those of a fourth, and so do eight
// labels of 8 bytes.
template <class T, class Target, bool kFactors>
inline constexpr int kPacketBlocks = !kFactors || kPacketOf<T> * sizeof(Target) > 2 * kPacketBytes ? 3 : 4;

template <class Loss, class T, class Target, bool kFactors, Pass kPass>
__global__ void __launch_bounds__(kElementwiseThreads, kPacketBlocks<T, Target, kFactors>)
    elementwise_packets(const __grid_constant__ ElementwiseArgs args, const __grid_constant__ ElementwiseRun run) {
  ElementwisePackets<Loss, T, Target, kFactors, kPass>(args, run).process();
}

template <class Loss, class T, Pass kPass>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
    elementwise(const __grid_constant__ ElementwiseArgs args, const __grid_constant__ ElementwiseRun run) {
  AnyElements<Loss, T, kPass>(args, run).process();
}

// The divisor of the mean where elements are ignored, before anything else.
template <class Target, class Acc>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_divisor(const __grid_constant__ ElementwiseArgs args, const GridSums grid, const Total total) {
  const std::int64_t thread = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t threads = std::int64_t(gridDim.x) * blockDim.x;
  Sums sums;
  sums.divisor = count_elements<Target>(args, static_cast<Acc>(args.ignore_index), thread, threads);
  add_up(grid, total, blockIdx.x, sums);
}

// --- The choice ---------------------------------------------------------------------------------------------------

using ElementwiseKernel = void (*)(ElementwiseArgs, ElementwiseRun);
using ElementwiseDivisorKernel = void (*)(ElementwiseArgs, GridSums, Total);

inline Walk walk_of(const ElementwiseTensor& tensor, const ElementwiseShape& shape) {
  const int last = shape.dims - 1;
  const bool one_row = std::all_of(&tensor.strides[0], &tensor.strides[std::max(last, 0)],
                                   [](std::int64_t stride) { return stride == 0; });
  if (!tensor.data || (one_row && (last < 0 || tensor.strides[last] == 0))) return Walk::number;
  if (tensor.linear) return Walk::elements;
  const bool fits = shape.sizes[last] <= std::numeric_limits<int>::max();
  return one_row && tensor.strides[last] == 1 && fits ? Walk::columns : Walk::other;
}

template <class Loss, class T, class Target, bool kFactors>
ElementwiseKernel elementwise_packets_kernel(Pass pass) {
  switch (pass) {
    case Pass::forward: return elementwise_packets<Loss, T, Target, kFactors, Pass::forward>;
    case Pass::forward_with_gradient:
      return elementwise_packets<Loss, T, Target, kFactors, Pass::forward_with_gradient>;
    default: return elementwise_packets<Loss, T, Target, kFactors, Pass::backward>;
  }
}

template <class Loss, class T>
ElementwiseKernel elementwise_kernel(Pass pass) {
  switch (pass) {
    case Pass::forward: return elementwise<Loss, T, Pass::forward>;
    case Pass::forward_with_gradient: return elementwise<Loss, T, Pass::forward_with_gradient>;
    default: return elementwise<Loss, T, Pass::backward>;
  }
}

// The input's type and nothing else.
inline bool is_plain(const ElementwiseArgs& args, const ElementwiseRun& run) {
  return args.target.dtype == args.dtype && !args.weight.data && !args.pos_weight.data && run.grad_loss == Walk::number;
}

// The kernels for packets are compiled for few types: the input's, and those of labels; and not for float64, a type
// that is for checking. Null where the general kernel is needed.
template <class Loss, class T>
ElementwiseKernel elementwise_packets_kernel(const ElementwiseArgs& args, Pass pass, const ElementwiseRun& run) {
  const auto in_one_piece = [&](const ElementwiseTensor& result) {
    return !result.data || (result.linear && result.dtype == args.dtype);
  };
  const auto is_factor = [&](const ElementwiseTensor& tensor, Walk walk) {
    const bool fits = tensor.dtype == args.dtype || tensor.dtype == Dtype::float32;
    return walk == Walk::number || (walk != Walk::other && fits);
  };
  const bool fits = args.input.linear && args.target.linear && in_one_piece(args.loss) &&
                    in_one_piece(args.grad_input) && !args.grad_target.data &&
                    (pass == Pass::forward || (args.grad_input.data && !args.loss.data)) &&
                    is_factor(args.weight, run.weight) && is_factor(args.pos_weight, run.pos_weight) &&
                    is_factor(args.grad_loss, run.grad_loss);
  if constexpr (!std::is_same_v<T, double>) {
    if (!fits) return nullptr;
    if (is_plain(args, run)) return elementwise_packets_kernel<Loss, T, T, false>(pass);
    if (args.target.dtype == args.dtype) return elementwise_packets_kernel<Loss, T, T, true>(pass);
    if (args.target.dtype == Dtype::uint8) return elementwise_packets_kernel<Loss, T, std::uint8_t, true>(pass);
    if (args.target.dtype == Dtype::int64) return elementwise_packets_kernel<Loss, T, std::int64_t, true>(pass);
  }
  return nullptr;
}

template <class T>
ElementwiseDivisorKernel elementwise_divisor_kernel(const ElementwiseTensor& target, Dtype dtype) {
  using Acc = Accumulate<T>;
  if (target.linear && target.dtype == dtype) return elementwise_divisor<T, Acc>;
  if (target.linear && target.dtype == Dtype::uint8) return elementwise_divisor<std::uint8_t, Acc>;
  return elementwise_divisor<void, Acc>;
}

inline std::int64_t bytes_of(Dtype dtype) {
  std::int64_t bytes = 0;
  with_dtype(dtype, [&]<class T>() { bytes = sizeof(T); });
  return bytes;
}

template <class T>
ElementwiseRun elementwise_run(const ElementwiseArgs& args) {
  ElementwiseRun run{.divisor = static_cast<double>(args.shape.numel),
                     .weight = walk_of(args.weight, args.shape),
                     .pos_weight = walk_of(args.pos_weight, args.shape),
                     .grad_loss = walk_of(args.grad_loss, args.shape)};
  constexpr int kWidth = kPacketOf<T>;
  const int head = Span<const T>(static_cast<const T*>(args.input.data), args.shape.numel).head;
  const auto starts_packet = [&](const ElementwiseTensor& tensor) {
    const std::int64_t bytes = bytes_of(tensor.dtype), packet = std::min<std::int64_t>(kPacketBytes, kWidth * bytes);
    return !tensor.data || (reinterpret_cast<std::uintptr_t>(tensor.data) + head * bytes) % packet == 0;
  };
  run.packets = starts_packet(args.target) && starts_packet(args.loss) && starts_packet(args.grad_input);
  for (const auto& [tensor, walk] : {std::pair(&args.weight, run.weight), std::pair(&args.pos_weight, run.pos_weight),
                                     std::pair(&args.grad_loss, run.grad_loss)}) {
    if (walk == Walk::number) continue;
    run.packets = run.packets && tensor->dtype == args.dtype && starts_packet(*tensor);
    if (walk != Walk::columns) continue;
    run.columns = static_cast<unsigned>(args.shape.sizes[args.shape.dims - 1]);
    run.packets = run.packets && run.columns % kWidth == 0 && head == 0;
  }
  return run;
}

template <class Loss, class T>
void launch_elementwise_of(const ElementwiseArgs& args, Pass pass, const Allocate& allocate, void* stream) {
  const std::int64_t numel = args.shape.numel;
  const bool totals = pass != Pass::backward && (args.total.loss || args.total.divisor);
  if (numel == 0 && !totals) return;

  ElementwiseRun run = elementwise_run<T>(args);
  const ElementwiseKernel in_packets = elementwise_packets_kernel<Loss, T>(args, pass, run);
  const ElementwiseKernel kernel = in_packets ? in_packets : elementwise_kernel<Loss, T>(pass);
  const ElementwiseDivisorKernel count_kernel = elementwise_divisor_kernel<T>(args.target, args.dtype);
  const bool counts = pass == Pass::forward_with_gradient && args.total.reduction == Reduction::mean &&
                      args.has_ignore_index && numel > kElementsCountedInline;
  const auto shape_of = [&](auto kernel, std::int64_t per_thread) {
    return in_turns(kernel, kElementwiseThreads, ceil_div(numel, kElementwiseThreads * per_thread));
  };
  const int width = run.packets ? kPacketOf<T> : 1;
  const int in_flight = is_plain(args, run) ? kPacketsInFlight<false> : kPacketsInFlight<true>;
  const Launch shape = shape_of(kernel, in_packets ? width * in_flight : 1);
  const Launch count_shape = counts ? shape_of(count_kernel, kPacketOf<T>) : Launch{};

  Workspace workspace;
  const Piece divisor = workspace.take(counts, sizeof(double));
  const GridPieces count_grid = workspace.take_grid(count_shape.blocks);
  const GridPieces grid = workspace.take_grid(totals ? shape.blocks : 1);
  const Memory memory(workspace, allocate, stream);
  double* const counted = memory.at<double>(divisor);
  if (counts) {
    const Total total{.reduction = Reduction::mean, .divisor = counted};
    launch("elementwise_divisor", count_kernel, count_shape, stream, args, memory.grid(count_grid), total);
  }
  run.grid = memory.grid(grid);
  run.counted = counted;
  launch("elementwise", kernel, shape, stream, args, run);
}

template <class Loss>
void launch_elementwise(const ElementwiseArgs& args, Pass pass, const Allocate& allocate, void* stream) {
  with_floating(args.dtype, [&]<class T>() { launch_elementwise_of<Loss, T>(args, pass, allocate, stream); });
}

}  // namespace fusedloss::cuda
