// A gradient that was written in forward, once the grad_output is known: one launch that returns at once where it is
// what forward has assumed.

#include "../../math/reduction.h"
#include "device.h"
#include "packets.cuh"

namespace fusedloss::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacketsInFlight = 4;  // of a thread

template <class T>
__global__ void __launch_bounds__(kThreads, 4) rescale_gradient(const __grid_constant__ RescaleArgs args) {
  using Acc = Accumulate<T>;
  const double scale = args.scale ? *args.scale : 1;
  const double quotient = load_floating<double>(args.grad_output, args.grad_output_dtype, 0) / scale;
  if (quotient == 1) return;
  const Acc factor = static_cast<Acc>(quotient);
  const bool keeps_zeros = args.keep_zeros && !(math::abs(factor) < math::kInfinity<Acc>);  // a finite one keeps them
  const auto rescale = [&](auto packet) {
    Acc values[sizeof(packet) / sizeof(T)];
    packet.unpack(values);
    if (keeps_zeros) {
#pragma unroll
      for (Acc& value : values) value = math::rescaled(value, factor, true);
    } else {
#pragma unroll
      for (Acc& value : values) value = math::rescaled(value, factor, false);
    }
    return packet.pack(values);
  };
  const Span<T> grads(static_cast<T*>(args.grad), args.numel);
  const std::int64_t step = std::int64_t(gridDim.x) * kPacketsInFlight * kThreads;
  std::int64_t p = std::int64_t(blockIdx.x) * kPacketsInFlight * kThreads + threadIdx.x;
  if (p < grads.singles) {
    T* const single = grads.data + grads.single(static_cast<int>(p));
    store_streaming(single, rescale(load_streaming<1>(single)));
  }
  constexpr int kApart = kThreads * kPacketOf<T>;
  for (T* at = grads.data + grads.first(p); p < grads.packets; p += step, at += step * kPacketOf<T>) {
    Packet<T> packets[kPacketsInFlight];
#pragma unroll
    for (int k = 0; k < kPacketsInFlight; ++k) {
      if (p + k * kThreads < grads.packets) packets[k] = load_streaming<kPacketOf<T>>(at + k * kApart);
    }
#pragma unroll
    for (int k = 0; k < kPacketsInFlight; ++k) {
      if (p + k * kThreads < grads.packets) store_streaming(at + k * kApart, rescale(packets[k]));
    }
  }
}

}  // namespace

void rescale(const RescaleArgs& args, void* stream) {
  if (args.numel == 0) return;
  with_floating(args.dtype, [&]<class T>() {
    const std::int64_t blocks = ceil_div(args.numel, kThreads * kPacketsInFlight * kPacketOf<T>);
    const Launch shape = in_turns(rescale_gradient<T>, kThreads, blocks);
    launch("rescale_gradient", rescale_gradient<T>, shape, stream, args);
  });
}

}  // namespace fusedloss::cuda
