// How a linear layer and its loss go through their logits, the largest tensor of a language model's step: a pure
// function of sizes and of what is wanted. There are three plans for a step.
//
//   one_chunk   forward makes all logits and writes their gradient over them; backward multiplies it with the input and
//               the weight. Scratch: the logits.
//   chunks      forward makes the logits of some rows at a time, and multiplies their gradient at once: what it keeps
//               are the gradients of input and weight, float32 where they are of half precision. Scratch: a chunk of
//               logits, and that accumulator.
//   recomputed  forward keeps two numbers for each row, and backward makes the logits again: an eighth product beside
//               six. For gradients that forward cannot know: of an unreduced loss, or through lse and entropy.
//
// One chunk is quickest and rounds least. Chunks save memory only where there are more rows than a chunk and what the
// accumulator takes: below, one chunk is also the smallest.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace fusedloss::ops {

enum class LinearPlan { one_chunk, chunks, recomputed };

// Sizes may be symbolic: a compiler then learns no more of them than which side of a comparison they are on.
template <class Size = std::int64_t>
struct LinearProblem {
  Size rows;                           // N
  Size features;                       // D
  Size logits;                         // of a row: V, classes times positions
  std::int64_t logit_bytes;            // of one
  std::int64_t accumulator_bytes;      // that chunks need beside each entry of the weight's gradient
  std::int64_t best_chunk;             // rows from which on the products are at their best
  bool known_in_forward;               // the gradient is, but for a factor
  bool adds_up;                        // gradients of chunks may be added up
  std::optional<std::int64_t> memory;  // bytes of scratch that are allowed; absent: what the best plan takes
  std::optional<std::int64_t> chunk;   // rows that a caller asks for

  Size row_bytes() const { return logits * logit_bytes; }
  Size accumulator() const { return logits * features * accumulator_bytes; }
};

// A product of fewer rows, or classes, reads its other operand for nearly nothing: no memory is so tight.
inline constexpr std::int64_t kFewestRows = 32, kFewestClasses = 64;

// at_most(a, b): whether a <= b; false where nobody can know.
template <class Size, class AtMost>
LinearPlan linear_plan(const LinearProblem<Size>& p, AtMost at_most) {
  if (!p.known_in_forward) return LinearPlan::recomputed;
  const LinearPlan several = p.adds_up ? LinearPlan::chunks : LinearPlan::recomputed;
  if (p.chunk) return at_most(p.rows, Size(*p.chunk)) ? LinearPlan::one_chunk : several;
  const Size scratch = p.rows * p.row_bytes();
  if (p.memory) {
    const Size memory(*p.memory);
    if (at_most(scratch, memory)) return LinearPlan::one_chunk;
    return at_most(p.accumulator() + p.row_bytes() * kFewestRows, memory) ? several : LinearPlan::recomputed;
  }
  return at_most(scratch, p.accumulator() + p.row_bytes() * p.best_chunk) ? LinearPlan::one_chunk : several;
}

inline LinearPlan linear_plan(const LinearProblem<>& p) {
  return linear_plan(p, [](std::int64_t a, std::int64_t b) { return a <= b; });
}

// Rows of a chunk, where there are several: as many as the memory beside `taken` allows, and all chunks about the same.
inline std::int64_t linear_chunk(const LinearProblem<>& p, std::int64_t taken) {
  if (p.chunk) return *p.chunk;
  std::int64_t most = p.best_chunk;
  if (p.memory) most = std::min(most, (*p.memory - taken) / std::max<std::int64_t>(p.row_bytes(), 1));
  most = std::max(most, kFewestRows);
  if (p.rows <= most) return most;
  constexpr std::int64_t kMultiple = 32;
  const std::int64_t count = (p.rows + most - 1) / most, even = (p.rows + count - 1) / count;
  return std::min(most, (even + kMultiple - 1) / kMultiple * kMultiple);
}

// Classes whose logits backward makes at a time, of all rows, where it makes them again: `positions` logits of each row
// and class.
inline std::int64_t linear_slice(const LinearProblem<>& p, std::int64_t classes, std::int64_t positions) {
  constexpr std::int64_t kBytes = std::int64_t(64) << 20;
  const std::int64_t class_bytes = std::max<std::int64_t>(p.rows * positions * p.logit_bytes, 1);
  // Beside them lies the gradient of the input, which adds up in float32.
  const std::int64_t taken = p.logit_bytes < 4 ? p.rows * p.features * std::int64_t(sizeof(float)) : 0;
  const std::int64_t allowed = p.memory ? *p.memory - taken : std::max(kBytes, p.best_chunk * p.row_bytes() / 4);
  const std::int64_t most = std::max(allowed / class_bytes, kFewestClasses);
  return most >= classes ? std::max<std::int64_t>(classes, 1) : most / kFewestClasses * kFewestClasses;
}

}  // namespace fusedloss::ops
