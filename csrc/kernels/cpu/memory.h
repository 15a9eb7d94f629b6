// Between memory and the accumulate type: every kernel loads a run of elements, whatever their type and stride, into
// values it computes with, and stores a run of results. So the kernels themselves are written for float and double
// only. A run that already has the right type and no gaps is used where it lies.

#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../types.h"
#include "blocks.h"
#include "vector.h"

namespace fusedloss::cpu {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

template <class T>
inline constexpr bool kIsHalf = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

template <class To, class From>
[[gnu::always_inline]] inline To convert(From value) {
  return static_cast<To>(value);
}

template <class To>
[[gnu::always_inline]] inline To convert(BFloat16 value) {
  return static_cast<To>(std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16));
}

// Denormals are converted as integers, so that they survive flush-to-zero modes.
template <class To>
[[gnu::always_inline]] inline To convert(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fff;
  const std::uint32_t rebias = 112u << 23;
  const std::uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00 ? rebias : 0);
  const float denormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const std::uint32_t bits = magnitude < 0x0400 ? std::bit_cast<std::uint32_t>(denormal) : normal;
  return static_cast<To>(std::bit_cast<float>(bits | sign));
}

// Round to nearest, ties to even: a float's bits to those of a bfloat16, of one number or of a vector.
template <class Bits>
[[gnu::always_inline]] inline Bits bfloat16_bits(Bits bits) {
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? Bits{} + 0x7fc0 : rounded;
}

[[gnu::always_inline]] inline BFloat16 to_bfloat16(float value) {
  return {static_cast<std::uint16_t>(bfloat16_bits(std::bit_cast<std::uint32_t>(value)))};
}

[[gnu::always_inline]] inline Float16 to_float16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000;
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 aligns the last bit with float16's smallest denormal, and rounds there.
  const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
  const std::uint32_t denormal = std::bit_cast<std::uint32_t>(aligned) - std::bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t finite = magnitude < (113u << 23) ? denormal : normal;
  const std::uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return {static_cast<std::uint16_t>(sign | (magnitude < 0x477ff000 ? finite : special))};
}

template <class To, class Acc>
[[gnu::always_inline]] inline To round_to(Acc value) {
  if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, Float16>) {
    return to_float16(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

#if FUSEDLOSS_VECTORS
// Vectors from memory, and to it, rounded as one by one. (The instruction for bfloat16 that some processors have takes
// denormals for zeros.)
template <class Vectors, class T>
FUSEDLOSS_FN Vectors load_vectors(const T* from) {
  if constexpr (std::is_same_v<T, float>) return Vectors::load(from);
  Vectors loaded;
  unrolled<Vectors::kCount>([&](int i) {
    const T* part = from + i * FUSEDLOSS_LANES;
    if constexpr (std::is_same_v<T, BFloat16>) loaded.part[i] = std::bit_cast<Floats>(load_16_bits(part) << 16);
    if constexpr (std::is_same_v<T, Float16>) loaded.part[i] = load_float16(part);
  });
  return loaded;
}

template <class Vectors, class T>
FUSEDLOSS_FN void store_vectors(const Vectors& values, T* to) {
  if constexpr (std::is_same_v<T, float>) return values.store(to);
  unrolled<Vectors::kCount>([&](int i) {
    T* part = to + i * FUSEDLOSS_LANES;
    if constexpr (std::is_same_v<T, BFloat16>) {
      store_16_bits(Ints(bfloat16_bits(std::bit_cast<Unsigned>(values.part[i]))), part);
    }
    if constexpr (std::is_same_v<T, Float16>) store_float16(values.part[i], part);
  });
}

// The first `count` lanes from memory, in which elements of the same row lie before, as many as a vector has or more;
// `rest` in the others.
template <class T>
FUSEDLOSS_FN Floats load_row_end(const T* from, std::int64_t count, Floats rest) {
  if constexpr (std::is_same_v<T, float>) {
    return load_first(from, count, rest);
  } else {
    if (count >= FUSEDLOSS_LANES) return load_vectors<FloatVector>(from).part[0];
    if (count <= 0) return rest;
    // The vector that ends with them, of which the last lanes move to the front.
    const Floats last = load_vectors<FloatVector>(from + count - FUSEDLOSS_LANES).part[0];
    const Ints lane = kLaneNumbers, moved = entries(std::bit_cast<Ints>(last), lane - std::int32_t(count));
    return lane < std::int32_t(count) ? std::bit_cast<Floats>(moved) : rest;
  }
}

// Calls body(i) for vectors that begin at i and cover the first of `count` elements; returns how many. If there are
// enough for one vector they cover all of them: the last repeats what the one before has done.
template <class Body>
[[gnu::always_inline]] inline std::int64_t by_vectors(std::int64_t count, Body body) {
  constexpr int kVector = FloatVector::kLanes;
  std::int64_t done = 0;
  for (; done + kVector <= count; done += kVector) body(done);
  if (done == 0 || done == count) return done;
  body(count - kVector);
  return count;
}
#endif

// result[i] = values[i], rounded. Half precision is converted by the vector: the compiler does not find the
// instructions.
template <class T, class Acc>
[[gnu::always_inline]] inline void store_each(T* result, std::int64_t count, const Acc* values) {
  std::int64_t done = 0;
#if FUSEDLOSS_VECTORS
  if constexpr (kIsHalf<T> && std::is_same_v<Acc, float>) {
    done = by_vectors(count, [=](std::int64_t i) __attribute__((always_inline)) {
      store_vectors(FloatVector::load(values + i), result + i);
    });
  }
#endif
#pragma omp simd
  for (std::int64_t i = done; i < count; ++i) result[i] = round_to<T>(values[i]);
}

// result[i] = value(i), likewise. What is computed is kept apart from its rounding: GCC 12 finds no vector form of
// both.
template <class T, class Value>
  requires std::is_invocable_v<Value, std::int64_t>
[[gnu::always_inline]] inline void store_each(T* result, std::int64_t count, Value value) {
  using Acc = std::invoke_result_t<Value, std::int64_t>;
  if constexpr (std::is_floating_point_v<T>) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) result[i] = static_cast<T>(value(i));
  } else {
    Acc values[kWidest];
    std::int64_t done = 0;
    for (; done + kWidest <= count; done += kWidest) {
#pragma omp simd
      for (int i = 0; i < kWidest; ++i) values[i] = value(done + i);
      store_each(result + done, kWidest, static_cast<const Acc*>(values));
    }
    for (std::int64_t i = done; i < count; ++i) result[i] = round_to<T>(value(i));
  }
}

// And back.
template <class Value, class T>
[[gnu::always_inline]] inline void load_each(Value* result, std::int64_t count, const T* values) {
  std::int64_t done = 0;
#if FUSEDLOSS_VECTORS
  if constexpr (kIsHalf<T> && std::is_same_v<Value, float>) {
    done = by_vectors(count, [=](std::int64_t i) __attribute__((always_inline)) {
      load_vectors<FloatVector>(values + i).store(result + i);
    });
  }
#endif
#pragma omp simd
  for (std::int64_t i = done; i < count; ++i) result[i] = convert<Value>(values[i]);
}

// dtype becomes a type here and nowhere else on the CPU.
template <class F>
[[gnu::always_inline]] inline decltype(auto) with_dtype(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::float32: return body.template operator()<float>();
    case Dtype::float64: return body.template operator()<double>();
    case Dtype::bfloat16: return body.template operator()<BFloat16>();
    case Dtype::float16: return body.template operator()<Float16>();
    case Dtype::uint8: return body.template operator()<std::uint8_t>();
    case Dtype::int8: return body.template operator()<std::int8_t>();
    case Dtype::int16: return body.template operator()<std::int16_t>();
    case Dtype::int32: return body.template operator()<std::int32_t>();
    case Dtype::int64: return body.template operator()<std::int64_t>();
  }
  __builtin_unreachable();
}

template <class F>
[[gnu::always_inline]] inline decltype(auto) with_floating(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::float32: return body.template operator()<float>();
    case Dtype::float64: return body.template operator()<double>();
    case Dtype::bfloat16: return body.template operator()<BFloat16>();
    case Dtype::float16: return body.template operator()<Float16>();
    default: __builtin_unreachable();
  }
}

inline std::int64_t size_of(Dtype dtype) {
  return with_dtype(dtype, []<class T>() { return static_cast<std::int64_t>(sizeof(T)); });
}

// The accumulate type of an element type.
template <class F>
[[gnu::always_inline]] inline decltype(auto) with_accumulate(Dtype dtype, F&& body) {
  return dtype == Dtype::float64 ? body.template operator()<double>() : body.template operator()<float>();
}

template <class T>
inline constexpr Dtype kDtypeOf = std::is_same_v<T, double> ? Dtype::float64 : Dtype::float32;

// The weights of a chunk or a run, where there are none.
template <class Acc>
inline constexpr std::array<Acc, kChunk> kOnes = [] {
  std::array<Acc, kChunk> ones{};
  ones.fill(Acc(1));
  return ones;
}();

// Elements offset, offset + stride, ... of data. The result is `buffer`, or the elements themselves.
template <class Value>
const Value* load(const void* data, Dtype dtype, std::int64_t offset, std::int64_t stride, std::int64_t count,
                  Value* buffer) {
  return with_dtype(dtype, [&]<class T>() -> const Value* {
    const T* source = static_cast<const T*>(data) + offset;
    if (stride == 1) {
      if constexpr (std::is_same_v<T, Value>) return source;
      load_each(buffer, count, source);
    } else if (stride == 0) {
      const Value value = convert<Value>(*source);
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) buffer[i] = value;
    } else {
      for (std::int64_t i = 0; i < count; ++i) buffer[i] = convert<Value>(source[i * stride]);
    }
    return buffer;
  });
}

// Consecutive positions; ones where there is no tensor, at most kChunk.
template <class Value>
const Value* load_positions(const PositionTensor& tensor, std::int64_t begin, std::int64_t count, Value* buffer) {
  if constexpr (std::is_floating_point_v<Value>) {
    if (!tensor.data) return kOnes<Value>.data();
  }
  return load(tensor.data, tensor.dtype, begin * tensor.stride, tensor.stride, count, buffer);
}

// Where results that `store` will be given should be computed: in place when nothing has to be converted.
template <class Acc>
Acc* destination(void* data, Dtype dtype, std::int64_t offset, std::int64_t stride, Acc* buffer) {
  return stride == 1 && dtype == kDtypeOf<Acc> ? static_cast<Acc*>(data) + offset : buffer;
}

template <class Acc>
void store(void* data, Dtype dtype, std::int64_t offset, std::int64_t stride, std::int64_t count, const Acc* values) {
  with_floating(dtype, [&]<class T>() {
    T* result = static_cast<T*>(data) + offset;
    if constexpr (std::is_same_v<T, Acc>) {
      if (result == values) return;
    }
    if (stride == 1) {
      store_each(result, count, values);
    } else {
      for (std::int64_t i = 0; i < count; ++i) result[i * stride] = round_to<T>(values[i]);
    }
  });
}

inline constexpr std::int64_t kLine = 64;  // bytes of a line of the cache

// Starts to bring `count` neighbouring elements into the cache, which are going to be read or written. They need not
// exist. Always inlined: a call that only prefetches has no effect in the eyes of GCC, which deletes it.
template <bool kForWriting>
[[gnu::always_inline]] inline void prefetch(const void* data, Dtype dtype, std::int64_t offset, std::int64_t count) {
  const std::int64_t size = size_of(dtype);
  const char* first = static_cast<const char*>(data) + offset * size;
  for (std::int64_t i = 0; i < count * size; i += kLine) __builtin_prefetch(first + i, kForWriting);
}

inline void store_zeros(void* data, Dtype dtype, std::int64_t offset, std::int64_t stride, std::int64_t count) {
  with_floating(dtype, [&]<class T>() {
    T* result = static_cast<T*>(data) + offset;
    if (stride == 1) {
      std::memset(static_cast<void*>(result), 0, count * sizeof(T));
    } else {
      for (std::int64_t i = 0; i < count; ++i) result[i * stride] = T{};
    }
  });
}

}  // namespace
}  // namespace fusedloss::cpu
