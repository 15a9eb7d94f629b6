// Between memory and the accumulate type on the device: element types, packets of 16 bytes, and rows as spans of them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan.h"

namespace fusedloss::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The same bytes, as another type: std::bit_cast for types of CUDA, which not all are trivial.
template <class To, class From>
__device__ __forceinline__ To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

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
// read an operand of any type). A body for the host alone is no mistake.
#pragma nv_exec_check_disable
template <class F>
__host__ __device__ __forceinline__ void with_floating(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::float32: return body.template operator()<float>();
    case Dtype::float64: return body.template operator()<double>();
    case Dtype::bfloat16: return body.template operator()<BFloat16>();
    default: return body.template operator()<Float16>();
  }
}

#pragma nv_exec_check_disable
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

// Two elements of half precision that share a word.
template <class T>
struct Pair;

template <>
struct Pair<BFloat16> {
  using Type = __nv_bfloat162;
  // A float whose lower half is zero.
  __device__ __forceinline__ static float low(std::uint32_t word) { return __uint_as_float(word << 16); }
  __device__ __forceinline__ static float high(std::uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ __forceinline__ static Type rounded(float low, float high) { return __floats2bfloat162_rn(low, high); }
};

template <>
struct Pair<Float16> {
  using Type = __half2;
  __device__ __forceinline__ static float low(std::uint32_t word) { return __low2float(bits<Type>(word)); }
  __device__ __forceinline__ static float high(std::uint32_t word) { return __high2float(bits<Type>(word)); }
  __device__ __forceinline__ static Type rounded(float low, float high) { return __floats2half2_rn(low, high); }
};

// N neighbouring elements as they lie in memory: words, which are taken apart only where they are used. A thread that
// took a packet apart as it comes would wait for it before it asks for the next.
template <class T, int N = kPacketOf<T>>
struct alignas(N * sizeof(T)) Packet {
  static constexpr bool kPairs = (std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>) && N % 2 == 0;
  using Word = std::conditional_t<sizeof(T) < 4 && N * sizeof(T) % 4 == 0, std::uint32_t, T>;
  static constexpr int kWords = N * sizeof(T) / sizeof(Word);

  Word words[kWords];

  __device__ __forceinline__ static Packet filled(T value) {
    T values[N];
#pragma unroll
    for (T& element : values) element = value;
    return bits<Packet>(values);
  }

  template <class Acc>
  __device__ __forceinline__ void unpack(Acc (&x)[N]) const {
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = i % 2 ? Pair<T>::high(words[i / 2]) : Pair<T>::low(words[i / 2]);
    } else if constexpr (std::is_same_v<T, std::uint8_t> && sizeof(Word) == 4) {
      // A byte becomes the lowest of 2^23, whose unit in the last place is 1.
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = static_cast<Acc>(__uint_as_float(__byte_perm(words[i / 4], 0x4b000000u, 0x7440u + i % 4)) - 0x1p23f);
      }
    } else {
      T values[N];
      memcpy(values, words, sizeof(values));
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = convert<Acc>(values[i]);
    }
  }

  template <class Acc>
  __device__ __forceinline__ static Packet pack(const Acc (&x)[N]) {
    Packet packet;
    if constexpr (kPairs) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) packet.words[w] = bits<Word>(Pair<T>::rounded(x[2 * w], x[2 * w + 1]));
    } else {
      T values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = convert<T>(x[i]);
      memcpy(packet.words, values, sizeof(values));
    }
    return packet;
  }

  // The larger of the two at each place; NaN is passed over.
  __device__ __forceinline__ Packet max(const Packet& other) const {
    Packet packet;
#pragma unroll
    for (int w = 0; w < kWords; ++w) packet.words[w] = max_of(words[w], other.words[w]);
    return packet;
  }

  // The largest element.
  __device__ __forceinline__ Accumulate<T> max() const {
    Word largest = words[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) largest = max_of(largest, words[w]);
    if constexpr (kPairs) {
      return math::max_ignoring_nan(Pair<T>::low(largest), Pair<T>::high(largest));
    } else {
      return convert<Accumulate<T>>(largest);
    }
  }

 private:
  __device__ __forceinline__ static Word max_of(Word a, Word b) {
    if constexpr (kPairs) {
      using Type = typename Pair<T>::Type;
      return bits<Word>(__hmax2(bits<Type>(a), bits<Type>(b)));
    } else {
      using Acc = Accumulate<T>;
      return convert<Word>(math::max_ignoring_nan(convert<Acc>(a), convert<Acc>(b)));
    }
  }
};

template <class T, int N, int kPackets>
__device__ __forceinline__ Accumulate<T> max_of(const Packet<T, N> (&packets)[kPackets]) {
  Packet<T, N> largest = packets[0];
#pragma unroll
  for (int u = 1; u < kPackets; ++u) largest = largest.max(packets[u]);
  return largest.max();
}

#if defined(__CUDA_EMU__)
// The emulator counts bytes, and its compiler, which knows no price of a load, may read an inlined packet twice.
#define FUSEDLOSS_LOAD __noinline__
#else
#define FUSEDLOSS_LOAD __forceinline__
#endif

// The type in which a packet of so many bytes is read and written.
template <int kBytes>
using PacketBits = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;

// Streamed: each is used once, and must not drive from the cache what is used again. A packet of more than 16 bytes
// comes in several loads. One element alone is no packet: its neighbours are read by others.
template <int N, class T>
__device__ FUSEDLOSS_LOAD Packet<T, N> load_streaming(const T* from) {
  constexpr int kBytes = sizeof(Packet<T, N>), kLoads = kBytes > kPacketBytes ? kBytes / kPacketBytes : 1;
  using Bits = PacketBits<kBytes / kLoads>;
  if constexpr (N > 1) {
    Bits loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) loaded[k] = __ldcs(reinterpret_cast<const Bits*>(from) + k);
    return bits<Packet<T, N>>(loaded);
  }
  return Packet<T, N>::filled(from[0]);
}

// Not streamed: it is used again.
template <int N, class T>
__device__ __forceinline__ Packet<T, N> load_cached(const T* from) {
  using Bits = PacketBits<sizeof(Packet<T, N>)>;
  if constexpr (N > 1) return bits<Packet<T, N>>(*reinterpret_cast<const Bits*>(from));
  return Packet<T, N>::filled(from[0]);
}

template <class T, int N>
__device__ __forceinline__ void store_streaming(T* to, const Packet<T, N>& packet) {
  using Bits = PacketBits<sizeof(Packet<T, N>)>;
  if constexpr (N > 1) {
    __stcs(reinterpret_cast<Bits*>(to), bits<Bits>(packet));
  } else {
    to[0] = bits<T>(packet);
  }
}

// Where packets of another tensor may not be aligned.
template <class T, int N>
__device__ __forceinline__ void store_packet(T* to, const Packet<T, N>& packet, bool aligned) {
  if (aligned) return store_streaming(to, packet);
  T elements[N];
  memcpy(elements, &packet, sizeof(elements));
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = elements[i];
}

template <class T>
__host__ __device__ __forceinline__ bool is_aligned(const T* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kPacketBytes == 0;
}

// How many elements a row starts behind the start of its first packet.
template <class T>
__host__ __device__ __forceinline__ int misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % kPacketBytes / sizeof(T));
}

// `count` elements from `data` on: a body of packets that are aligned in memory, and before and behind it single
// elements, fewer than two packets hold. Nothing has to be asked of a packet then, and each single element has a thread
// of its own.
template <class T, class Index = std::int64_t>
struct Span {
  using Value = std::remove_const_t<T>;
  static constexpr int kWidth = kPacketOf<Value>;

  T* data;
  Index packets;
  int head;     // elements before the body
  int singles;  // before it and behind it

  // from_start: the first packet begins with the first element, wherever that lies; see `gather`.
  __host__ __device__ __forceinline__ Span(T* data, Index count, bool from_start = false) : data(data) {
    const Index before = from_start ? 0 : (kWidth - misalignment(data)) % kWidth;
    head = static_cast<int>(before < count ? before : count);
    packets = (count - head) / kWidth;
    singles = static_cast<int>(count - packets * kWidth);
  }

  // The first element of a packet, and the place of a single one.
  __device__ __forceinline__ Index first(Index p) const { return head + p * kWidth; }
  __device__ __forceinline__ Index single(int i) const { return i < head ? i : i + packets * kWidth; }

  // Which of so many threads has an element, where thread t has the packets and the single elements t, t + threads, ...
  __device__ __forceinline__ int owner(Index element, int threads) const {
    const Index p = packet_of(element);
    return static_cast<int>((p >= 0 ? p : element < head ? element : element - packets * kWidth) % threads);
  }
  // The packet that has an element; -1: the element is single.
  __device__ __forceinline__ Index packet_of(Index element) const {
    const Index in_body = element - head, p = in_body / kWidth;
    return in_body >= 0 && p < packets ? p : -1;
  }

  __device__ __forceinline__ Packet<Value> load(Index p) const { return load_streaming<kWidth>(data + first(p)); }
  // The same of a packet that is not aligned.
  __device__ __forceinline__ Packet<Value> gather(Index p) const {
    Value values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = data[first(p) + i];
    return bits<Packet<Value>>(values);
  }
  __device__ __forceinline__ void store(Index p, const Packet<Value>& packet) const {
    store_streaming(data + first(p), packet);
  }
};

}  // namespace fusedloss::cuda
