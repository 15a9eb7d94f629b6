// What the losses over classes share: which dimension holds the classes, the checks of a class-index target, and
// tensors as (outer, classes, inner).

#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels/class_loss.h"
#include "launch.h"
#include "losses.h"

namespace fusedloss::ops {

inline int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

// The shape of the unreduced loss: the logits' shape without the classes.
c10::SymDimVector position_sizes(const Tensor& logits);

void check_class_target(const char* loss, const Tensor& logits, const Tensor& target);
// `beside_indices`: native torch accepts a weight of any shape with one element per class, beside class indices of an
// input that has inner dimensions.
void check_class_weight(const char* loss, const Tensor& logits, OptionalTensor weight, bool beside_indices = true);
// Beside class indices the weight has the input's type; under autocast, one that autocast makes equal to it.
void check_weight_type(const char* loss, const Tensor& logits, OptionalTensor weight, bool upcast);
// Raises if a kernel has found that the target at a position is no class; -1: it has found none.
void check_in_bounds(const char* loss, int64_t classes, const Tensor& target, int64_t position);
// Raises of the first target that is no class, where no kernel has looked at them all. On the CPU alone.
void check_targets(const char* loss, int64_t classes, const Tensor& target, int64_t ignore_index);

// An output with the logits' shape, type and, where a kernel can write it, memory layout.
Tensor empty_like_logits(const Tensor& logits);

// A tensor with the logits' shape that a kernel can address; a copy where the inner dimensions cannot be merged.
Tensor addressable(const Tensor& tensor);

// Fills `shape` and the views of all tensors, which are addressable, and but for the first may be undefined: absent.
// Positions that lie at one stride in all of them are merged into the inner dimension.
struct ClassOperand {
  const Tensor& tensor;
  ClassTensor& view;
};
void fill_class_views(ClassShape& shape, std::initializer_list<ClassOperand> operands);

// A tensor with an element for each position, or one of no dimension for all of them. The result keeps the memory
// alive.
Tensor position_view(const Tensor& tensor, PositionTensor& view);

// Where a forward kernel writes: the loss, for each position or reduced, and the divisor if it is defined.
template <class Args>
void set_results(Args& args, const Tensor& loss, const Tensor& divisor, Reduction reduction,
                 const Tensor& denominator = {}) {
  args.total = total_of(loss, divisor, reduction, denominator);
  if (!args.total.loss) args.loss = {loss.data_ptr(), dtype_of(loss.scalar_type()), 1};
}

// (classes,) of the accumulate type of `dtype`, or null. The result keeps the memory alive.
Tensor weight_view(OptionalTensor weight, at::ScalarType dtype, const void*& view);

}  // namespace fusedloss::ops
