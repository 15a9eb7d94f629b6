// Arguments of the losses over classes. A tensor of logits is seen as (outer, classes, inner): (N, C) has inner 1,
// (N, C, H, W) has inner H * W, and so has channels_last, with other strides. A position is one (outer, inner) pair,
// numbered outer * inner_size + inner; everything that exists once for each position lies in that order without gaps.

#pragma once

#include <cstdint>

#include "../math/cross_entropy.h"
#include "types.h"

namespace fusedloss {

struct ClassShape {
  std::int64_t outer = 1;
  std::int64_t classes = 1;
  std::int64_t inner = 1;

  constexpr std::int64_t positions() const { return outer * inner; }
};

// A tensor of shape (outer, classes, inner); strides count elements. data is null where the tensor is absent.
struct ClassTensor {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  std::int64_t outer_stride = 0;
  std::int64_t class_stride = 0;
  std::int64_t inner_stride = 0;
};

// The target of a position is a class index, and these are the options that go with it.
struct ClassTarget {
  PositionTensor index;           // an integer type
  std::int64_t ignore_index = 0;  // any value; positions with it count for nothing
};

struct CrossEntropyArgs : math::RowOptions {
  ClassShape shape;
  ClassTensor logits;
  // The classes may be some of many, from first_class on, of all_classes; 0: they are all. A target that is none of
  // these, but one of all, counts, and puts no mass on them. Smoothing spreads its mass over all.
  std::int64_t first_class = 0;
  std::int64_t all_classes = 0;
  bool has_probabilities = false;  // which of the next two the target is; a pointer would not tell, without classes
  ClassTarget target;
  ClassTensor probabilities;     // (outer, classes, inner)
  const void* weight = nullptr;  // (classes,) of the accumulate type, or null
  PositionTensor sample_weight;  // of a floating type; null: ones
  bool every_row = false;        // something is wanted of ignored positions too

  // Forward writes these, if they are there; backward reads them. All of the accumulate type.
  void* row_max = nullptr;      // (positions,)
  void* row_log_sum = nullptr;  // (positions,)
  void* row_gap = nullptr;      // (positions,), beside an entropy
  // (positions,), null but where the classes are some of many: forward writes the mass on these, backward reads that on
  // all of them. Of rows that do not count it is anything.
  void* row_mass = nullptr;

  // Forward
  PositionTensor loss;             // (positions,), or null when the loss is reduced
  void* lse = nullptr;             // (positions,) of the accumulate type, or null
  void* entropy = nullptr;         // likewise; not with a gradient
  std::int64_t* argmax = nullptr;  // (positions,) of the logits as they are, or null
  Total total;

  // Backward, and forward with gradient, which has no grad_lse, no grad_entropy and no grad_probabilities
  PositionTensor grad_loss;              // the gradient of each loss; null: ones
  const double* grad_divisor = nullptr;  // of the mean, which grad_loss is divided by; null: not divided
  const void* grad_lse = nullptr;        // (positions,) of the accumulate type, or null
  const void* grad_entropy = nullptr;    // likewise
  ClassTensor grad_logits;               // may be the logits themselves
  ClassTensor grad_probabilities;

  constexpr std::int64_t class_count() const { return all_classes != 0 ? all_classes : shape.classes; }
};

struct NllArgs {
  ClassShape shape;
  ClassTensor log_probs;
  ClassTarget target;
  const void* weight = nullptr;  // (classes,) of the accumulate type, or null

  // Forward
  PositionTensor loss;  // null when the loss is reduced
  Total total;

  // Backward
  PositionTensor grad_loss;              // the gradient of each loss; null: ones
  const double* grad_divisor = nullptr;  // of the mean, which grad_loss is divided by; null: not divided
  ClassTensor grad_log_probs;
};

}  // namespace fusedloss
