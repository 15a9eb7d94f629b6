// Elements of every type in memory, as numbers; and what storing a number in a type may round off.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "kernels/types.h"

namespace check {

using fusedloss::Dtype;

template <class F>
decltype(auto) with_element(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::float32: return body(float());
    case Dtype::float64: return body(double());
    case Dtype::bfloat16: return body(__nv_bfloat16());
    case Dtype::float16: return body(__half());
    case Dtype::uint8: return body(std::uint8_t());
    case Dtype::int8: return body(std::int8_t());
    case Dtype::int16: return body(std::int16_t());
    case Dtype::int32: return body(std::int32_t());
    case Dtype::int64: return body(std::int64_t());
  }
  __builtin_unreachable();
}

inline std::int64_t size_of(Dtype dtype) {
  return with_element(dtype, [](auto element) { return static_cast<std::int64_t>(sizeof(element)); });
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "uint8",
                                    "int8",    "int16",   "int32",    "int64"};
  return kNames[static_cast<int>(dtype)];
}

inline Dtype accumulate_type(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

inline double read(const void* data, Dtype dtype, std::int64_t index) {
  return with_element(dtype, [&]<class T>(T) -> double {
    const T value = static_cast<const T*>(data)[index];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __bfloat162float(value);
    } else if constexpr (std::is_same_v<T, __half>) {
      return __half2float(value);
    } else {
      return static_cast<double>(value);
    }
  });
}

inline void write(void* data, Dtype dtype, std::int64_t index, double value) {
  with_element(dtype, [&]<class T>(T) {
    T& element = static_cast<T*>(data)[index];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      element = __float2bfloat16_rn(static_cast<float>(value));
    } else if constexpr (std::is_same_v<T, __half>) {
      element = __float2half_rn(static_cast<float>(value));
    } else {
      element = static_cast<T>(value);
    }
  });
}

// Half a unit in the last place: what one operation in this type rounds off, relative to its result.
inline double unit(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 0x1p-53;
    case Dtype::float32: return 0x1p-24;
    case Dtype::float16: return 0x1p-11;
    default: return 0x1p-8;
  }
}

// The smallest normal number: what a flush to zero loses at most.
inline double smallest_normal(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 0x1p-1022;
    case Dtype::float16: return 0x1p-14;
    default: return 0x1p-126;
  }
}

// What storing `value` rounds off; denormal numbers lie as far apart as those above them.
inline double rounding(Dtype dtype, double value) {
  return unit(dtype) * std::max(std::fabs(value), smallest_normal(dtype));
}

// Numbers that are the same on every machine: the standard's distributions are not.
class Random {
 public:
  explicit Random(std::uint64_t seed) : generator_(seed) {}

  std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(generator_() % std::uint64_t(limit)); }
  double uniform() { return static_cast<double>(generator_() >> 11) * 0x1p-53; }
  // The sum of four uniform numbers, of variance 1: close enough to normal, and without a far tail.
  double bell() { return (uniform() + uniform() + uniform() + uniform() - 2) * std::sqrt(3.0); }

 private:
  std::mt19937_64 generator_;
};

}  // namespace check
