// Between memory and the accumulate type: every kernel loads a run of elements, whatever their type and stride, into
// values it computes with, and stores a run of results. So the kernels themselves are written for float and double
// only. A run that already has the right type and no gaps is used where it lies.

#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../types.h"

namespace fusedloss::cpu {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

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

// Round to nearest, ties to even.
[[gnu::always_inline]] inline BFloat16 to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
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

// The accumulate type of an element type.
template <class F>
[[gnu::always_inline]] inline decltype(auto) with_accumulate(Dtype dtype, F&& body) {
  return dtype == Dtype::float64 ? body.template operator()<double>() : body.template operator()<float>();
}

template <class T>
inline constexpr Dtype kDtypeOf = std::is_same_v<T, double> ? Dtype::float64 : Dtype::float32;

// Elements offset, offset + stride, ... of data. The result is `buffer`, or the elements themselves.
template <class Value>
const Value* load(const void* data, Dtype dtype, std::int64_t offset, std::int64_t stride, std::int64_t count,
                  Value* buffer) {
  return with_dtype(dtype, [&]<class T>() -> const Value* {
    const T* source = static_cast<const T*>(data) + offset;
    if (stride == 1) {
      if constexpr (std::is_same_v<T, Value>) return source;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) buffer[i] = convert<Value>(source[i]);
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
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) result[i] = round_to<T>(values[i]);
    } else {
      for (std::int64_t i = 0; i < count; ++i) result[i * stride] = round_to<T>(values[i]);
    }
  });
}

}  // namespace
}  // namespace fusedloss::cpu
