// Negative log likelihood: one log-probability is read for each position, and one entry of the gradient is not zero.
// Backward writes the whole gradient, in one launch: a block fills the rows of its positions with zeros, and then puts
// the targets' entries among them.

#include "../../math/nll.h"
#include "class_loss.cuh"
#include "reduce.cuh"
#include "workspace.h"

namespace fusedloss::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ Accumulate<T> weight_of(const NllArgs& args, int index) {
  return args.weight ? static_cast<const Accumulate<T>*>(args.weight)[index] : Accumulate<T>(1);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    nll_forward(const __grid_constant__ NllArgs args, const __grid_constant__ GridSums grid) {
  using Acc = Accumulate<T>;
  const std::int64_t positions = args.shape.positions(), step = std::int64_t(gridDim.x) * blockDim.x;
  Sums sums;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < positions; i += step) {
    const int index = class_of(args.target, index_at(args.target.index, i), args.shape.classes);
    Acc loss = Acc(0);
    if (index >= 0) {
      const T* row = static_cast<const T*>(args.log_probs.data) + offset_of(args.shape, args.log_probs, i);
      const Acc weight = weight_of<T>(args, index);
      loss = math::nll_loss(convert<Acc>(row[index * args.log_probs.class_stride]), weight);
      sums.divisor += static_cast<double>(weight);
    }
    sums.loss += static_cast<double>(loss);
    if (args.loss.data) store(args.loss.data, args.loss.dtype, i, loss);
  }
  add_up(grid, args.total, blockIdx.x, sums);
}

struct Layout {
  std::int64_t positions_per_block = 1;
  bool stream = false;  // the positions' rows follow one another in memory
  bool rows = false;    // a row's classes do
};

// Zeros for the positions [begin, end).
template <class T>
__device__ __forceinline__ void fill(const NllArgs& args, const Layout& layout, std::int64_t begin, std::int64_t end) {
  const ClassTensor& tensor = args.grad_log_probs;
  T* grad = static_cast<T*>(tensor.data);
  const std::int64_t classes = args.shape.classes, entries = (end - begin) * classes;
  const T zero = convert<T>(0.0f);
  if (layout.stream) {
    const Span<T> to(grad + begin * classes, entries);
    for (std::int64_t p = threadIdx.x; p < to.packets; p += blockDim.x) to.store(p, Packet<T>::filled(zero));
    if (threadIdx.x < to.singles) to.data[to.single(threadIdx.x)] = zero;
    return;
  }
  // Neighbouring threads write neighbours in memory.
  const std::int64_t positions = end - begin;
  for (std::int64_t e = threadIdx.x; e < entries; e += blockDim.x) {
    const std::int64_t position = layout.rows ? e / classes : e % positions;
    const std::int64_t c = layout.rows ? e % classes : e / positions;
    grad[offset_of(args.shape, tensor, begin + position) + c * tensor.class_stride] = zero;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    nll_backward(const __grid_constant__ NllArgs args, const __grid_constant__ Layout layout) {
  using Acc = Accumulate<T>;
  const std::int64_t positions = args.shape.positions(), size = layout.positions_per_block;
  const double scale = math::mean_scale(args.grad_divisor);
  T* grad = static_cast<T*>(args.grad_log_probs.data);
  for (std::int64_t begin = blockIdx.x * size; begin < positions; begin += gridDim.x * size) {
    const std::int64_t end = begin + size < positions ? begin + size : positions;
    fill<T>(args, layout, begin, end);
    __syncthreads();
    for (std::int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const int index = class_of(args.target, index_at(args.target.index, i), args.shape.classes);
      if (index < 0) continue;
      const PositionTensor& grad_loss = args.grad_loss;
      const double g =
          grad_loss.data ? scale * load_floating<double>(grad_loss.data, grad_loss.dtype, i * grad_loss.stride) : scale;
      const std::int64_t at = offset_of(args.shape, args.grad_log_probs, i) + index * args.grad_log_probs.class_stride;
      grad[at] = convert<T>(math::nll_grad(static_cast<Acc>(g), weight_of<T>(args, index)));
    }
  }
}

void backward(const NllArgs& args, void* stream) {
  constexpr std::int64_t kEntries = 16384;  // of a block's turn
  const std::int64_t positions = args.shape.positions(), classes = args.shape.classes;
  if (positions == 0 || classes == 0) return;
  Layout layout;
  layout.positions_per_block = std::max<std::int64_t>(1, kEntries / classes);
  layout.rows = args.grad_log_probs.class_stride == 1;
  layout.stream = layout.rows && args.shape.outer == 1 && args.grad_log_probs.inner_stride == classes;
  with_floating(args.grad_log_probs.dtype, [&]<class T>() {
    const Launch shape = in_turns(nll_backward<T>, kThreads, ceil_div(positions, layout.positions_per_block));
    launch("nll_backward", nll_backward<T>, shape, stream, args, layout);
  });
}

}  // namespace

void launch_nll(const NllArgs& args, Pass pass, const Allocate& allocate, void* stream) {
  if (pass == Pass::backward) return backward(args, stream);
  with_floating(args.log_probs.dtype, [&]<class T>() {
    const Launch shape = in_turns(nll_forward<T>, kThreads, ceil_div(args.shape.positions(), kThreads));
    Workspace workspace;
    const GridPieces grid = workspace.take_grid(args.total.loss || args.total.divisor ? shape.blocks : 1);
    const Memory memory(workspace, allocate, stream);
    launch("nll_forward", nll_forward<T>, shape, stream, args, memory.grid(grid));
  });
}

}  // namespace fusedloss::cuda
