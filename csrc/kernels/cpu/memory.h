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

// result[i] = values[i], rounded. Where an instruction rounds to float16 it is used: the compiler does not find it.
template <class T, class Acc>
[[gnu::always_inline]] inline void store_each(T* result, std::int64_t count, const Acc* values) {
  std::int64_t done = 0;
#if FUSEDLOSS_VECTORS
  if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Acc, float>) {
    constexpr int kVector = FloatVector::kLanes;
    for (; done + kVector <= count; done += kVector) store_float16(FloatVector::load(values + done), result + done);
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
  if constexpr (std::is_same_v<T, Float16> && std::is_same_v<Value, float>) {
    constexpr int kVector = FloatVector::kLanes;
    for (; done + kVector <= count; done += kVector) load_float16(values + done).store(result + done);
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

// Starts to bring `count` neighbouring elements into the cache, which are going to be written. They need not exist.
// Always inlined: a call that only prefetches has no effect in the eyes of GCC, which deletes it.
[[gnu::always_inline]] inline void prefetch_for_writing(const void* data, Dtype dtype, std::int64_t offset,
                                                        std::int64_t count) {
  const std::int64_t size = size_of(dtype);
  const char* first = static_cast<const char*>(data) + offset * size;
  for (std::int64_t i = 0; i < count * size; i += kLine) __builtin_prefetch(first + i, 1);
}

// Element (i, k) of four rows of four, `from_stride` apart, becomes (k, i). One at a time, an element would take more
// instructions than the arithmetic on it.
template <class Value>
[[gnu::always_inline]] inline void transpose_block(const Value* from, std::int64_t from_stride, Value* to,
                                                   std::int64_t to_stride) {
  typedef Value Row __attribute__((vector_size(4 * sizeof(Value))));
  Row row[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&row[i], from + i * from_stride, sizeof(Row));
  const Row low_01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Row low_23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Row high_01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Row high_23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  row[0] = __builtin_shufflevector(low_01, low_23, 0, 1, 4, 5);
  row[1] = __builtin_shufflevector(low_01, low_23, 2, 3, 6, 7);
  row[2] = __builtin_shufflevector(high_01, high_23, 0, 1, 4, 5);
  row[3] = __builtin_shufflevector(high_01, high_23, 2, 3, 6, 7);
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &row[i], sizeof(Row));
}

// Calls block(line, lane) for blocks of four lines by four lanes that cover all lines, and returns how many lanes they
// cover. The last block of a lane may repeat lines of the one before.
template <class F>
[[gnu::always_inline]] inline std::int64_t for_blocks(std::int64_t lines, std::int64_t lanes, F&& block) {
  std::int64_t lane = 0;
  for (; lines >= 4 && lane + 4 <= lanes; lane += 4) {
    for (std::int64_t line = 0; line < lines; line += 4) block(std::min(line, lines - 4), lane);
  }
  return lane;
}

// A tile of (lines, lanes) consists of blocks of (lines, kWidest lanes): here element (line, lane) lies at
inline std::int64_t in_tile(std::int64_t line, std::int64_t lane, std::int64_t lines) {
  return lane / kWidest * kWidest * lines + line * kWidest + lane % kWidest;
}

// Whether lanes are rows of few neighbouring elements, that are transposed on their way.
inline bool transposes(std::int64_t line_stride, std::int64_t lines) {
  return line_stride == 1 && lines <= kRowClasses;
}

// Loads a tile from where element (line, lane) lies at offset + line * line_stride + lane * lane_stride in data. Lanes
// that the last block has beyond those hold zeros. Where a lane's elements are neighbours, lanes are walked outermost,
// so that every cache line is touched once.
template <class Value>
void load_tile_of(const void* data, Dtype dtype, std::int64_t offset, std::int64_t line_stride,
                  std::int64_t lane_stride, std::int64_t lines, std::int64_t lanes, Value* tile) {
  const std::int64_t last = lanes / kWidest * kWidest;
  if (last < lanes) std::fill_n(tile + in_tile(0, last, lines), lines * kWidest, Value(0));
  with_floating(dtype, [&]<class T>() {
    const T* source = static_cast<const T*>(data) + offset;
    if (lane_stride == 1) {
      for (std::int64_t line = 0; line < lines; ++line) {
        const T* from = source + line * line_stride;
        for (std::int64_t lane = 0; lane < last; lane += kWidest) {
          load_each(tile + in_tile(line, lane, lines), kWidest, from + lane);
        }
        load_each(tile + in_tile(line, last, lines), lanes - last, from + last);
        // The lanes that follow are the next to be loaded; the processor's own prefetch stops at the end of a line.
        for (std::int64_t lane = 0; lane < lanes; lane += 64 / sizeof(T)) __builtin_prefetch(from + lanes + lane);
      }
    } else if (transposes(line_stride, lines)) {
      Value buffer[kWidest * kRowClasses];
      for (std::int64_t first = 0; first < lanes; first += kWidest) {
        const std::int64_t count = std::min<std::int64_t>(kWidest, lanes - first);
        const Value* rows = buffer;
        std::int64_t stride = lines;
        if constexpr (std::is_same_v<T, Value>) {
          rows = source + first * lane_stride;
          stride = lane_stride;
        } else if (lane_stride == lines) {
          load_each(buffer, count * lines, source + first * lane_stride);
        } else {
          for (std::int64_t i = 0; i < count; ++i)
            load_each(buffer + i * lines, lines, source + (first + i) * lane_stride);
        }
        Value* block = tile + in_tile(0, first, lines);
        const std::int64_t covered = for_blocks(lines, count, [&](std::int64_t line, std::int64_t lane) {
          transpose_block(rows + lane * stride + line, stride, block + in_tile(line, lane, lines), kWidest);
        });
        for (std::int64_t lane = covered; lane < count; ++lane) {
          for (std::int64_t line = 0; line < lines; ++line)
            block[in_tile(line, lane, lines)] = rows[lane * stride + line];
        }
      }
    } else {
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        const T* from = source + lane * lane_stride;
        for (std::int64_t line = 0; line < lines; ++line) {
          tile[in_tile(line, lane, lines)] = convert<Value>(from[line * line_stride]);
        }
      }
    }
  });
}

// The same way back.
template <class Value>
void store_tile_of(void* data, Dtype dtype, std::int64_t offset, std::int64_t line_stride, std::int64_t lane_stride,
                   std::int64_t lines, std::int64_t lanes, const Value* tile) {
  with_floating(dtype, [&]<class T>() {
    T* result = static_cast<T*>(data) + offset;
    if (lane_stride == 1) {
      for (std::int64_t line = 0; line < lines; ++line) {
        for (std::int64_t lane = 0; lane < lanes; lane += kWidest) {
          const Value* from = tile + in_tile(line, lane, lines);
          T* to = result + line * line_stride + lane;
          if (lane + kWidest <= lanes) {
            store_each(to, kWidest, from);
          } else {
            store_each(to, lanes - lane, from);
          }
        }
      }
    } else if (transposes(line_stride, lines)) {
      Value buffer[kWidest * kRowClasses];
      for (std::int64_t first = 0; first < lanes; first += kWidest) {
        const std::int64_t count = std::min<std::int64_t>(kWidest, lanes - first);
        Value* rows = buffer;
        std::int64_t stride = lines;
        if constexpr (std::is_same_v<T, Value>) {
          rows = result + first * lane_stride;
          stride = lane_stride;
        }
        const Value* block = tile + in_tile(0, first, lines);
        const std::int64_t covered = for_blocks(lines, count, [&](std::int64_t line, std::int64_t lane) {
          transpose_block(block + in_tile(line, lane, lines), kWidest, rows + lane * stride + line, stride);
        });
        for (std::int64_t lane = covered; lane < count; ++lane) {
          for (std::int64_t line = 0; line < lines; ++line)
            rows[lane * stride + line] = block[in_tile(line, lane, lines)];
        }
        if constexpr (!std::is_same_v<T, Value>) {
          const std::int64_t run = lane_stride == lines ? count * lines : lines;
          for (std::int64_t done = 0, i = 0; done < count * lines; done += run, ++i) {
            store_each(result + (first + i) * lane_stride, run, rows + done);
          }
        }
      }
    } else {
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        T* to = result + lane * lane_stride;
        for (std::int64_t line = 0; line < lines; ++line) {
          to[line * line_stride] = round_to<T>(tile[in_tile(line, lane, lines)]);
        }
      }
    }
  });
}

inline void store_zeros(void* data, Dtype dtype, std::int64_t offset, std::int64_t stride, std::int64_t count) {
  with_floating(dtype, [&]<class T>() {
    T* result = static_cast<T*>(data) + offset;
    if (stride == 1) {
      std::fill_n(result, count, T{});
    } else {
      for (std::int64_t i = 0; i < count; ++i) result[i * stride] = T{};
    }
  });
}

}  // namespace
}  // namespace fusedloss::cpu
