// Between memory and the accumulate type on the device: element types, and packets of 16 bytes.
//
// A row of any length that starts at any element is read and written in packets that are aligned in memory; its first
// and last packet may hang over its ends. One loop over packets serves body and ends alike: an entry outside the row is
// not accessed, and reads as a value that changes nothing.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "plan.h"

namespace fusedloss::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
__device__ __forceinline__ To convert(From value) {
  if constexpr (std::is_same_v<From, BFloat16>) {
    return static_cast<To>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<From, Float16>) {
    return static_cast<To>(__half2float(value));
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, Float16>) {
    return __float2half_rn(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

// dtype becomes a type here and nowhere else in the CUDA kernels, on the host (to choose a kernel) or on the device (to
// read an operand of any type).
template <class F>
__host__ __device__ __forceinline__ void with_floating(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::float32: return body.template operator()<float>();
    case Dtype::float64: return body.template operator()<double>();
    case Dtype::bfloat16: return body.template operator()<BFloat16>();
    default: return body.template operator()<Float16>();
  }
}

template <class F>
__host__ __device__ __forceinline__ void with_dtype(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::uint8: return body.template operator()<std::uint8_t>();
    case Dtype::int8: return body.template operator()<std::int8_t>();
    case Dtype::int16: return body.template operator()<std::int16_t>();
    case Dtype::int32: return body.template operator()<std::int32_t>();
    case Dtype::int64: return body.template operator()<std::int64_t>();
    default: return with_floating(dtype, static_cast<F&&>(body));
  }
}

template <class Value>
__device__ __forceinline__ Value load(const void* data, Dtype dtype, std::int64_t offset) {
  Value value;
  with_dtype(dtype, [&]<class T>() { value = convert<Value>(static_cast<const T*>(data)[offset]); });
  return value;
}

// Loads an element of any floating-point type.
template <class Value>
__device__ __forceinline__ Value load_floating(const void* data, Dtype dtype, std::int64_t offset) {
  Value value;
  with_floating(dtype, [&]<class T>() { value = convert<Value>(static_cast<const T*>(data)[offset]); });
  return value;
}

template <class Value>
__device__ __forceinline__ void store(void* data, Dtype dtype, std::int64_t offset, Value value) {
  with_floating(dtype, [&]<class T>() { static_cast<T*>(data)[offset] = convert<T>(value); });
}

// --- Packets ------------------------------------------------------------------------------------------------

template <class T>
inline constexpr int kPacketOf = kPacketBytes / sizeof(T);

// N neighbouring elements as they lie in memory.
template <class T, int N = kPacketOf<T>>
struct alignas(N * sizeof(T)) Packet {
  T values[N];
};

#if defined(__CUDA_EMU__)
// The emulator counts bytes, and its compiler, which knows no price of a load, may read an inlined packet twice.
#define FUSEDLOSS_LOAD __noinline__
#else
#define FUSEDLOSS_LOAD __forceinline__
#endif

// Streamed: each is used once, and must not drive from the cache what is used again.
template <int N, class T>
__device__ FUSEDLOSS_LOAD Packet<T, N> load_streaming(const T* from) {
  Packet<T, N> packet;
  if constexpr (sizeof(packet) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    memcpy(&packet, &bits, sizeof(bits));
  } else {
    for (int i = 0; i < N; ++i) packet.values[i] = from[i];
  }
  return packet;
}

template <class T, int N>
__device__ __forceinline__ void store_streaming(T* to, const Packet<T, N>& packet) {
  if constexpr (sizeof(packet) == 16) {
    uint4 bits;
    memcpy(&bits, &packet, sizeof(bits));
    __stcs(reinterpret_cast<uint4*>(to), bits);
  } else {
    for (int i = 0; i < N; ++i) to[i] = packet.values[i];
  }
}

template <class T>
__host__ __device__ __forceinline__ bool is_aligned(const T* address, int bytes = kPacketBytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

// How many elements a row starts behind the start of its first packet.
template <class T>
__host__ __device__ __forceinline__ int misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % kPacketBytes / sizeof(T));
}

// `count` elements from `row` on, as packets: packet p holds the elements [first(p), first(p) + kPacketOf<T>).
template <class T>
struct Packets {
  using Value = std::remove_const_t<T>;
  static constexpr int kWidth = kPacketOf<T>;

  T* row;
  std::int64_t count;
  int start;  // the row's misalignment

  __host__ __device__ __forceinline__ Packets(T* row, std::int64_t count)
      : row(row), count(count), start(misalignment(row)) {}

  __host__ __device__ __forceinline__ std::int64_t size() const { return (start + count + kWidth - 1) / kWidth; }
  __device__ __forceinline__ std::int64_t first(std::int64_t p) const { return p * kWidth - start; }
  __device__ __forceinline__ bool is_whole(std::int64_t first) const { return first >= 0 && first + kWidth <= count; }

  __device__ __forceinline__ Packet<Value> load(std::int64_t p, Value fill) const {
    const std::int64_t c = first(p);
    if (is_whole(c)) return load_streaming<kWidth>(row + c);
    Packet<Value> packet;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) packet.values[i] = c + i >= 0 && c + i < count ? row[c + i] : fill;
    return packet;
  }

  // Writes the elements [first, first + kWidth), wherever the packets of this row begin.
  __device__ __forceinline__ void store(std::int64_t first, const Packet<Value>& packet) const {
    if (is_whole(first) && is_aligned(row + first)) return store_streaming(row + first, packet);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (first + i >= 0 && first + i < count) row[first + i] = packet.values[i];
    }
  }
};

}  // namespace fusedloss::cuda
