// Losses of one element on the device: a stream of packets. A formula is a struct of three functions, as on the CPU:
// in_domain, evaluate (loss and slope) and target_grad (csrc/math/bce.h).
//
// Where everything lies in one piece, input and target have one type and there are no weights, a packet of 16 bytes of
// each is in hand at once. Anything else (weights that broadcast, strides, labels in integers, a gradient to the
// target) takes the general kernel, whose operands may each have a type and strides of their own.

#pragma once

#include "device_assert.cuh"
#include "reduce.cuh"
#include "workspace.h"

namespace fusedloss::cuda {

inline constexpr int kElementwiseThreads = 256;
// Up to this many elements every block counts for itself those that are not ignored.
inline constexpr std::int64_t kElementsCountedInline = 16384;

struct ElementwiseRun {
  GridSums grid;
  double divisor = 0;               // of the mean, where no element is ignored
  const double* counted = nullptr;  // of the mean, where a launch has counted it
};

// Sums of a thread: a few packets' losses in the accumulate type, then in float64, which most devices are slow at.
template <class Acc>
class ElementSums {
 public:
  __device__ __forceinline__ void add(Acc loss, int counted) {
    loss_ += loss;
    counted_ += counted;
    if (++packets_ == 16) flush();
  }
  __device__ __forceinline__ Sums total() {
    flush();
    return {sum_, static_cast<double>(counted_)};
  }

 private:
  __device__ __forceinline__ void flush() {
    sum_ += static_cast<double>(loss_);
    loss_ = Acc(0);
    packets_ = 0;
  }

  Acc loss_ = Acc(0);
  int packets_ = 0;
  double sum_ = 0;
  std::int64_t counted_ = 0;
};

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

 private:
  // A division of 64 bits takes several times as long as one of 32.
  __device__ __forceinline__ static std::int64_t divide(std::int64_t a, std::int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
    return a / b;
  }
};
template <class... Operands>
Offsets(const ElementwiseShape&, std::int64_t, const Operands&...) -> Offsets<sizeof...(Operands)>;

// Not inlined: nine types at each of its uses would make most of the general kernels' code.
template <class Acc>
__device__ __noinline__ Acc load_any(const void* data, Dtype dtype, std::int64_t offset) {
  return data ? load<Acc>(data, dtype, offset) : Acc(1);
}

template <class Acc>
__device__ __forceinline__ double count_elements(const ElementwiseArgs& args, Acc ignored, std::int64_t begin,
                                                 std::int64_t step) {
  std::int64_t counted = 0;
  for (std::int64_t e = begin; e < args.shape.numel; e += step) {
    const Offsets in(args.shape, e, args.target);
    counted += load_any<Acc>(args.target.data, args.target.dtype, in.at[0]) != ignored;
  }
  return static_cast<double>(counted);
}

template <class Loss, class T, bool kPlain, Pass kPass>
class Elementwise {
  using Acc = Accumulate<T>;
  static constexpr int kWidth = kPlain ? kPacketOf<T> : 1;

 public:
  // To be called by all threads of the block.
  __device__ __forceinline__ Elementwise(const ElementwiseArgs& args, const ElementwiseRun& run)
      : args_(args), ignored_(args.has_ignore_index ? static_cast<Acc>(args.ignore_index) : math::kNaN<Acc>) {
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
    one_grad_loss_ = kPass == Pass::forward_with_gradient || kPlain || !grad_loss.data;
    if (kPass != Pass::forward && grad_loss.data && one_grad_loss_)
      scale *= load_floating<double>(grad_loss.data, grad_loss.dtype, 0);
    scale_ = static_cast<Acc>(scale);
  }

  __device__ __forceinline__ void process(const ElementwiseRun& run) const {
    const std::int64_t numel = args_.shape.numel, step = std::int64_t(gridDim.x) * blockDim.x;
    const std::int64_t start = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const Packets<const T> packets(static_cast<const T*>(args_.input.data), numel);
    const std::int64_t count = kPlain ? packets.size() : numel;
    ElementSums<Acc> sums;
    for (std::int64_t p = start; p < count; p += step) {
      if constexpr (kPlain) {
        plain(packets, p, sums);
      } else {
        general(p, sums);
      }
    }
    if constexpr (kPass != Pass::backward) add_up(run.grid, args_.total, blockIdx.x, sums.total());
  }

 private:
  struct Element {
    Acc loss, grad;
    bool counts;
  };

  __device__ __forceinline__ Element evaluate(Acc x, Acc t, Acc w, Acc p, Acc grad_loss) const {
    const bool counts = t != ignored_;
    device_assert(!counts || (Loss::in_domain(x) && Loss::in_domain(t)));
    const auto result = Loss::evaluate(x, t, p);
    return {math::zero_if(!counts, w * result.loss), math::zero_if(!counts, grad_loss * w * result.slope), counts};
  }

  __device__ __forceinline__ void plain(const Packets<const T>& inputs, std::int64_t p, ElementSums<Acc>& sums) const {
    const std::int64_t numel = args_.shape.numel, first = inputs.first(p);
    const T* target = static_cast<const T*>(args_.target.data);
    const bool whole = inputs.is_whole(first);
    const Packet<T> x = inputs.load(p, convert<T>(Acc(0)));
    Packet<T> t;
    if (whole && is_aligned(target + first)) {
      t = load_streaming<kWidth>(target + first);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) t.values[i] = exists(first + i) ? target[first + i] : convert<T>(Acc(0));
    }
    Packet<T> grads;
    Acc loss = Acc(0);
    int counted = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Element element = evaluate(convert<Acc>(x.values[i]), convert<Acc>(t.values[i]), Acc(1), Acc(1), scale_);
      const bool is_there = whole || exists(first + i);
      loss += math::zero_if(!is_there, element.loss);
      counted += is_there && element.counts;
      if (kPass != Pass::backward && args_.loss.data && is_there) {
        store(args_.loss.data, args_.loss.dtype, first + i, element.loss);
      }
      grads.values[i] = convert<T>(element.grad);
    }
    sums.add(loss, counted);
    if constexpr (kPass != Pass::forward) {
      Packets<T>(static_cast<T*>(args_.grad_input.data), numel).store(first, grads);
    }
  }

  __device__ __forceinline__ bool exists(std::int64_t element) const {
    return element >= 0 && element < args_.shape.numel;
  }

  __device__ __forceinline__ void general(std::int64_t element, ElementSums<Acc>& sums) const {
    const Offsets in(args_.shape, element, args_.input, args_.target, args_.weight, args_.pos_weight, args_.grad_loss);
    const Acc x = convert<Acc>(static_cast<const T*>(args_.input.data)[in.at[0]]);
    const Acc t = load_any<Acc>(args_.target.data, args_.target.dtype, in.at[1]);
    const Acc w = load_any<Acc>(args_.weight.data, args_.weight.dtype, in.at[2]);
    const Acc p = load_any<Acc>(args_.pos_weight.data, args_.pos_weight.dtype, in.at[3]);
    const bool one_for_each = kPass == Pass::backward && !one_grad_loss_;
    const Acc g = one_for_each ? load_any<Acc>(args_.grad_loss.data, args_.grad_loss.dtype, in.at[4]) * scale_ : scale_;
    const Element result = evaluate(x, t, w, p, g);
    sums.add(result.loss, result.counts);

    const Offsets out(args_.shape, element, args_.loss, args_.grad_input, args_.grad_target);
    if (kPass != Pass::backward && args_.loss.data) store(args_.loss.data, args_.loss.dtype, out.at[0], result.loss);
    if (kPass != Pass::forward && args_.grad_input.data) {
      static_cast<T*>(args_.grad_input.data)[out.at[1]] = convert<T>(result.grad);
    }
    if (kPass == Pass::backward && args_.grad_target.data) {
      const Acc grad = math::zero_if(!result.counts, Loss::target_grad(x, t, p, g * w));
      store(args_.grad_target.data, args_.grad_target.dtype, out.at[2], grad);
    }
  }

  // The elements that are not ignored. By a whole block.
  __device__ __forceinline__ double counted() const {
    Sums sums;
    sums.divisor = count_elements(args_, ignored_, threadIdx.x, blockDim.x);
    return block_sum_for_all(sums).divisor;
  }

  const ElementwiseArgs& args_;
  const Acc ignored_;   // equal to no target where nothing is to be ignored
  bool one_grad_loss_;  // all losses have one gradient, which is in the scale
  Acc scale_;
};

template <class Loss, class T, bool kPlain, Pass kPass>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
    elementwise(const __grid_constant__ ElementwiseArgs args, const __grid_constant__ ElementwiseRun run) {
  Elementwise<Loss, T, kPlain, kPass>(args, run).process(run);
}

// The divisor of the mean where elements are ignored, before anything else.
template <class Acc>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_divisor(const __grid_constant__ ElementwiseArgs args, const GridSums grid, const Total total) {
  const Acc ignored = static_cast<Acc>(args.ignore_index);
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  Sums sums;
  sums.divisor = count_elements(args, ignored, std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step);
  add_up(grid, total, blockIdx.x, sums);
}

// Whether all losses have one gradient.
inline bool is_one_number(const ElementwiseArgs& args) {
  bool one = true;
  for (int d = 0; d < args.shape.dims; ++d) one = one && args.grad_loss.strides[d] == 0;
  return one || !args.grad_loss.data;
}

template <class Loss, class T, bool kPlain>
auto elementwise_kernel(Pass pass) {
  switch (pass) {
    case Pass::forward: return elementwise<Loss, T, kPlain, Pass::forward>;
    case Pass::forward_with_gradient: return elementwise<Loss, T, kPlain, Pass::forward_with_gradient>;
    default: return elementwise<Loss, T, kPlain, Pass::backward>;
  }
}

template <class Loss, class T>
void launch_elementwise_of(const ElementwiseArgs& args, Pass pass, const Allocate& allocate, void* stream) {
  const std::int64_t numel = args.shape.numel;
  const bool totals = pass != Pass::backward && (args.total.loss || args.total.divisor);
  if (numel == 0 && !totals) return;

  const auto in_one_piece = [&](const ElementwiseTensor& tensor) { return !tensor.data || tensor.linear; };
  const bool plain = args.target.dtype == args.dtype && args.input.linear && args.target.linear &&
                     in_one_piece(args.loss) && in_one_piece(args.grad_input) && !args.weight.data &&
                     !args.pos_weight.data && !args.grad_target.data &&
                     (pass == Pass::forward || args.grad_input.data) && (pass != Pass::backward || is_one_number(args));
  const bool counts = pass == Pass::forward_with_gradient && args.total.reduction == Reduction::mean &&
                      args.has_ignore_index && numel > kElementsCountedInline;
  const auto kernel = plain ? elementwise_kernel<Loss, T, true>(pass) : elementwise_kernel<Loss, T, false>(pass);
  constexpr auto count_kernel = elementwise_divisor<Accumulate<T>>;
  const auto shape_of = [](auto kernel, std::int64_t items) {
    return in_turns(kernel, kElementwiseThreads, ceil_div(items, kElementwiseThreads));
  };
  const Launch shape = shape_of(kernel, numel / (plain ? kPacketOf<T> : 1) + 1);
  const Launch count_shape = counts ? shape_of(count_kernel, numel) : Launch{};

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
  const ElementwiseRun run{memory.grid(grid), static_cast<double>(numel), counted};
  launch("elementwise", kernel, shape, stream, args, run);
}

template <class Loss>
void launch_elementwise(const ElementwiseArgs& args, Pass pass, const Allocate& allocate, void* stream) {
  with_floating(args.dtype, [&]<class T>() { launch_elementwise_of<Loss, T>(args, pass, allocate, stream); });
}

}  // namespace fusedloss::cuda
