// A gradient that was written in forward, once the grad_output is known: one launch that returns at once where it is
// what forward has assumed.

#include "../../math/reduction.h"
#include "device.h"
#include "packets.cuh"

namespace fusedloss::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) rescale_gradient(const __grid_constant__ RescaleArgs args) {
  using Acc = Accumulate<T>;
  const double scale = args.scale ? *args.scale : 1;
  const double factor = load_floating<double>(args.grad_output, args.grad_output_dtype, 0) / scale;
  if (factor == 1) return;
  const Packets<T> packets(static_cast<T*>(args.grad), args.numel);
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  for (std::int64_t p = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; p < packets.size(); p += step) {
    Packet<T> packet = packets.load(p, T{});
    for (T& value : packet.values) {
      value = convert<T>(math::rescaled(convert<Acc>(value), static_cast<Acc>(factor), args.keep_zeros));
    }
    packets.store(packets.first(p), packet);
  }
}

}  // namespace

void rescale(const RescaleArgs& args, void* stream) {
  if (args.numel == 0) return;
  with_floating(args.dtype, [&]<class T>() {
    const std::int64_t packets = ceil_div(args.numel, kPacketOf<T>) + 1;
    const Launch shape = in_turns(rescale_gradient<T>, kThreads, ceil_div(packets, kThreads));
    launch("rescale_gradient", rescale_gradient<T>, shape, stream, args);
  });
}

}  // namespace fusedloss::cuda
