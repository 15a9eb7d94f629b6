// Where the tensors of the losses over classes lie in memory, and what flows back into these losses.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/class_loss.h"
#include "tensor.h"

namespace check {

using fusedloss::ClassShape;
using fusedloss::ClassTensor;
using fusedloss::PositionTensor;

enum class Order { rows, columns, strided };

// first: elements before the first one, so that the base is not aligned. pad: elements between rows, or between the
// columns of one class and those of the next; without any, everything is in one piece.
struct Placement {
  Order order = Order::rows;
  std::int64_t first = 0;
  std::int64_t pad = 0;

  ClassTensor strides(const ClassShape& shape) const {
    // A gap between outer positions as well, unless everything is in one piece.
    const std::int64_t outer_gap = pad > 0 ? 1 : 0;
    switch (order) {
      case Order::rows: {
        const std::int64_t row = shape.classes + pad;
        return {nullptr, Dtype::float32, shape.inner * row + outer_gap, 1, row};
      }
      case Order::columns: {
        const std::int64_t line = shape.inner + pad;
        return {nullptr, Dtype::float32, shape.classes * line + outer_gap, line, 1};
      }
      default: {
        const std::int64_t row = 2 * shape.classes + 1 + pad;
        return {nullptr, Dtype::float32, shape.inner * row + outer_gap, 2, row};
      }
    }
  }
};

// A tensor of shape (outer, classes, inner). Its logical elements are ordered by position, then by class.
class ClassValues {
 public:
  ClassValues(std::string name, Dtype dtype, const ClassShape& shape, const Placement& placement)
      : view_(placement.strides(shape)), first_(placement.first) {
    view_.dtype = dtype;
    std::vector<std::int64_t> offsets;
    for (std::int64_t i = 0; i < shape.positions(); ++i) {
      for (std::int64_t c = 0; c < shape.classes; ++c) {
        offsets.push_back(first_ + i / shape.inner * view_.outer_stride + i % shape.inner * view_.inner_stride +
                          c * view_.class_stride);
      }
    }
    tensor_ = std::make_unique<Tensor>(std::move(name), dtype, std::move(offsets));
  }

  Tensor& tensor() { return *tensor_; }
  ClassTensor on_cpu() { return at(tensor_->on_cpu(first_)); }
  ClassTensor on_device() { return at(tensor_->on_device(first_)); }

 private:
  ClassTensor at(void* data) const {
    ClassTensor view = view_;
    view.data = data;
    return view;
  }

  ClassTensor view_;
  std::int64_t first_;
  std::unique_ptr<Tensor> tensor_;
};

inline std::unique_ptr<Tensor> one_each(const char* name, Dtype dtype, std::int64_t count) {
  return std::make_unique<Tensor>(name, dtype, in_a_row(count));
}

// Kinds of the gradient that flows into the losses: none is given, which means 1; one number; one for each loss.
enum class Flow { absent, one, each };

enum class Ignored { none, some, all };

// A class index for each position, or -1.
inline std::vector<std::int64_t> random_targets(Random& random, std::int64_t positions, std::int64_t classes,
                                                Dtype dtype, Ignored ignored) {
  const std::int64_t limit = dtype == Dtype::uint8 ? std::min<std::int64_t>(classes, 255) : classes;
  std::vector<std::int64_t> targets(positions);
  for (std::int64_t i = 0; i < positions; ++i) {
    targets[i] = random.below(std::max<std::int64_t>(limit, 1));
    // The first and the last class, where a row's ends are treated apart.
    if (i % 3 == 1) targets[i] = i % 2 == 0 ? 0 : limit - 1;
    // A short run of them, so that neighbours that share a packet are both ignored.
    if (ignored == Ignored::all || (ignored == Ignored::some && (i % 7 == 2 || i % 7 == 3))) targets[i] = -1;
  }
  return targets;
}

inline std::int64_t ignore_index_of(Dtype dtype) { return dtype == Dtype::uint8 ? 255 : -100; }

}  // namespace check
