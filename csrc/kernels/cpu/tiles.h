// Tiles of column order: (lines, lanes), a class for each line and a position for each lane, loaded from logits and
// stored to gradients of any type and strides. A tile consists of blocks of kWidest lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "blocks.h"
#include "memory.h"

namespace fusedloss::cpu {
namespace {

// Some chunks of four elements.
template <class Value, int kChunks>
struct Chunks {
  typedef Value Vector __attribute__((vector_size(4 * kChunks * sizeof(Value))));

  // From memory, or to it, `stride` apart.
  [[gnu::always_inline]] static Vector load(const Value* from, std::int64_t stride) {
    Vector loaded;
    if constexpr (kChunks == 1) {
      std::memcpy(&loaded, from, sizeof(loaded));
    } else {
      using Half = Chunks<Value, kChunks / 2>;
      const auto low = Half::load(from, stride), high = Half::load(from + kChunks / 2 * stride, stride);
      [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        loaded = __builtin_shufflevector(low, high, i...);
      }(std::make_integer_sequence<int, 4 * kChunks>());
    }
    return loaded;
  }
  [[gnu::always_inline]] static void store(Vector chunks, Value* to, std::int64_t stride) {
    if constexpr (kChunks == 1) {
      std::memcpy(to, &chunks, sizeof(chunks));
    } else {
      using Half = Chunks<Value, kChunks / 2>;
      [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        constexpr int kHalf = 2 * kChunks;
        Half::store(__builtin_shufflevector(chunks, chunks, i...), to, stride);
        Half::store(__builtin_shufflevector(chunks, chunks, (i + kHalf)...), to + kChunks / 2 * stride, stride);
      }(std::make_integer_sequence<int, 2 * kChunks>());
    }
  }

  // In each chunk, element (i, k) of the four becomes (k, i).
  [[gnu::always_inline]] static void transpose(Vector (&row)[4]) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      constexpr int kOther = 4 * kChunks;  // where the second's elements begin
      const auto low = [](Vector a, Vector b) __attribute__((always_inline)) {
        return __builtin_shufflevector(a, b, (i / 4 * 4 + i % 4 / 2 + i % 2 * kOther)...);
      };
      const auto high = [](Vector a, Vector b) __attribute__((always_inline)) {
        return __builtin_shufflevector(a, b, (i / 4 * 4 + 2 + i % 4 / 2 + i % 2 * kOther)...);
      };
      const auto first = [](Vector a, Vector b) __attribute__((always_inline)) {
        return __builtin_shufflevector(a, b, (i / 4 * 4 + i % 2 + i % 4 / 2 * kOther)...);
      };
      const auto second = [](Vector a, Vector b) __attribute__((always_inline)) {
        return __builtin_shufflevector(a, b, (i / 4 * 4 + 2 + i % 2 + i % 4 / 2 * kOther)...);
      };
      const Vector low_01 = low(row[0], row[1]), low_23 = low(row[2], row[3]);
      const Vector high_01 = high(row[0], row[1]), high_23 = high(row[2], row[3]);
      row[0] = first(low_01, low_23);
      row[1] = second(low_01, low_23);
      row[2] = first(high_01, high_23);
      row[3] = second(high_01, high_23);
    }(std::make_integer_sequence<int, 4 * kChunks>());
  }
};

// Between rows of few elements, `stride` apart, and the lines of a block of a tile: four elements of as many rows as a
// vector has lanes take each step together. One at a time, an element would take more instructions than the arithmetic
// on it. Calls body(line, lane, chunks) for pieces of four lines by 4 chunks lanes that cover all lines, and returns
// how many lanes they cover. The last piece of a lane may repeat lines of the one before.
template <class Value, class Body>
[[gnu::always_inline]] inline std::int64_t for_pieces(std::int64_t lines, std::int64_t lanes, Body body) {
  // With vectors of two chunks, putting them together takes longer than it saves.
  constexpr int kWide = std::is_same_v<Value, float> && FUSEDLOSS_LANES == 16 ? 4 : 1;
  std::int64_t lane = 0;
  const auto cover = [&]<int kChunks>(std::integral_constant<int, kChunks> chunks) __attribute__((always_inline)) {
    for (; lines >= 4 && lane + 4 * kChunks <= lanes; lane += 4 * kChunks) {
      for (std::int64_t line = 0; line < lines; line += 4) body(std::min(line, lines - 4), lane, chunks);
    }
  };
  cover(std::integral_constant<int, kWide>());
  if constexpr (kWide > 1) cover(std::integral_constant<int, 1>());
  return lane;
}

template <class Value>
[[gnu::always_inline]] inline void rows_to_lines(const Value* rows, std::int64_t stride, std::int64_t lines,
                                                 std::int64_t lanes, Value* block) {
  const auto piece = [&]<int kChunks>(std::int64_t line, std::int64_t lane, std::integral_constant<int, kChunks>)
                         __attribute__((always_inline)) {
                           using C = Chunks<Value, kChunks>;
                           typename C::Vector row[4];
                           for (int i = 0; i < 4; ++i) row[i] = C::load(rows + (lane + i) * stride + line, 4 * stride);
                           C::transpose(row);
                           for (int i = 0; i < 4; ++i)
                             std::memcpy(block + (line + i) * kWidest + lane, &row[i], sizeof(row[i]));
                         };
  for (std::int64_t lane = for_pieces<Value>(lines, lanes, piece); lane < lanes; ++lane) {
    for (std::int64_t line = 0; line < lines; ++line) block[line * kWidest + lane] = rows[lane * stride + line];
  }
}

template <class Value>
[[gnu::always_inline]] inline void lines_to_rows(const Value* block, std::int64_t lines, std::int64_t lanes,
                                                 Value* rows, std::int64_t stride) {
  const auto piece = [&]<int kChunks>(std::int64_t line, std::int64_t lane, std::integral_constant<int, kChunks>)
                         __attribute__((always_inline)) {
                           using C = Chunks<Value, kChunks>;
                           typename C::Vector row[4];
                           for (int i = 0; i < 4; ++i)
                             std::memcpy(&row[i], block + (line + i) * kWidest + lane, sizeof(row[i]));
                           C::transpose(row);
                           for (int i = 0; i < 4; ++i) C::store(row[i], rows + (lane + i) * stride + line, 4 * stride);
                         };
  for (std::int64_t lane = for_pieces<Value>(lines, lanes, piece); lane < lanes; ++lane) {
    for (std::int64_t line = 0; line < lines; ++line) rows[lane * stride + line] = block[line * kWidest + lane];
  }
}

// A tile of (lines, lanes) consists of blocks of (lines, kWidest lanes): here element (line, lane) lies at
inline std::int64_t in_tile(std::int64_t line, std::int64_t lane, std::int64_t lines) {
  return lane / kWidest * kWidest * lines + line * kWidest + lane % kWidest;
}

// Whether lanes are rows of few neighbouring elements, that are transposed on their way.
inline bool transposes(std::int64_t line_stride, std::int64_t lines) {
  return line_stride == 1 && lines <= kRowClasses;
}

// Elements that are converted before the first of them is transposed, or transposed before they are converted: what
// is read across vectors that have just been written waits until they are in the cache.
inline constexpr std::int64_t kConverted = 2 * kWidest * kRowClasses;

// How many lanes these are; without a conversion, all.
template <class T, class Value>
std::int64_t converted_lanes(std::int64_t lines) {
  if (std::is_same_v<T, Value> || lines == 0) return kLanes;
  return kConverted / (lines * kWidest) * kWidest;
}

// Calls body(lane, elements) for each run of neighbouring elements of the lanes [begin, end).
template <class Body>
[[gnu::always_inline]] inline void for_runs(std::int64_t lines, std::int64_t lane_stride, std::int64_t begin,
                                            std::int64_t end, Body body) {
  if (lane_stride == lines) return body(begin, (end - begin) * lines);
  for (std::int64_t lane = begin; lane < end; ++lane) body(lane, lines);
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
        Value* to = tile + in_tile(line, 0, lines);
        for (std::int64_t lane = 0; lane < last; lane += kWidest, to += lines * kWidest) {
          load_each(to, kWidest, from + lane);
        }
        load_each(to, lanes - last, from + last);
      }
    } else if (transposes(line_stride, lines)) {
      Value buffer[kConverted];
      const std::int64_t at_once = converted_lanes<T, Value>(lines);
      for (std::int64_t begin = 0; begin < lanes; begin += at_once) {
        const std::int64_t end = std::min(lanes, begin + at_once);
        const Value* rows = buffer;
        std::int64_t stride = lines;
        if constexpr (std::is_same_v<T, Value>) {
          rows = source + begin * lane_stride;
          stride = lane_stride;
        } else {
          for_runs(lines, lane_stride, begin, end, [&](std::int64_t lane, std::int64_t count) {
            load_each(buffer + (lane - begin) * lines, count, source + lane * lane_stride);
          });
        }
        for (std::int64_t lane = begin; lane < end; lane += kWidest, rows += kWidest * stride) {
          rows_to_lines(rows, stride, lines, std::min<std::int64_t>(kWidest, end - lane),
                        tile + in_tile(0, lane, lines));
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
  const std::int64_t last = lanes / kWidest * kWidest;
  with_floating(dtype, [&]<class T>() {
    T* result = static_cast<T*>(data) + offset;
    if (lane_stride == 1) {
      for (std::int64_t line = 0; line < lines; ++line) {
        const Value* from = tile + in_tile(line, 0, lines);
        T* to = result + line * line_stride;
        for (std::int64_t lane = 0; lane < last; lane += kWidest, from += lines * kWidest) {
          store_each(to + lane, kWidest, from);
        }
        store_each(to + last, lanes - last, from);
      }
    } else if (transposes(line_stride, lines)) {
      Value buffer[kConverted];
      const std::int64_t at_once = converted_lanes<T, Value>(lines);
      for (std::int64_t begin = 0; begin < lanes; begin += at_once) {
        const std::int64_t end = std::min(lanes, begin + at_once);
        Value* rows = buffer;
        std::int64_t stride = lines;
        if constexpr (std::is_same_v<T, Value>) {
          rows = result + begin * lane_stride;
          stride = lane_stride;
        }
        for (std::int64_t lane = begin; lane < end; lane += kWidest, rows += kWidest * stride) {
          lines_to_rows(tile + in_tile(0, lane, lines), lines, std::min<std::int64_t>(kWidest, end - lane), rows,
                        stride);
        }
        if constexpr (!std::is_same_v<T, Value>) {
          for_runs(lines, lane_stride, begin, end, [&](std::int64_t lane, std::int64_t count) {
            store_each(result + lane * lane_stride, count, buffer + (lane - begin) * lines);
          });
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

}  // namespace
}  // namespace fusedloss::cpu
