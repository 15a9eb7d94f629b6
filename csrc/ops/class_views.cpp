#include "class_views.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>

#include "checks.h"
#include "launch.h"

namespace fusedloss::ops {
namespace {

// The stride that walks all of dimensions 2 and up, if there is one.
std::optional<c10::SymInt> inner_stride(const Tensor& tensor) {
  const auto sizes = tensor.sym_sizes(), strides = tensor.sym_strides();
  std::optional<c10::SymInt> innermost, expected;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    if (!innermost) innermost = strides[d];
    if (expected && strides[d] != *expected) return std::nullopt;
    expected = strides[d] * sizes[d];
  }
  return innermost.value_or(0);
}

// One dimension always merges, whatever its size: a compiler that traces it need not know.
bool inner_dims_merge(const Tensor& tensor) { return tensor.dim() <= 3 || inner_stride(tensor).has_value(); }

}  // namespace

c10::SymDimVector position_sizes(const Tensor& logits) {
  c10::SymDimVector sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
  sizes.erase(sizes.begin() + class_dim(logits));
  return sizes;
}

void check_class_target(const char* loss, const Tensor& logits, const Tensor& target) {
  const auto logits_sizes = logits.sym_sizes();
  const auto target_sizes = target.sym_sizes();
  TORCH_CHECK_VALUE(logits.dim() > 0, loss, ": input must have a dimension of classes, got shape ", logits_sizes);
  const auto check_type = [&] {
    const auto type = target.scalar_type();
    TORCH_CHECK(type == at::kLong || type == at::kInt || type == at::kByte, loss,
                ": target must hold class indices as int64, int32 or uint8, or class probabilities in the shape of "
                "input; got ",
                type_and_shape(target));
  };
  if (logits.dim() == 1) {
    check_type();
    TORCH_CHECK(target.dim() <= 1, loss, ": target must be one class index for input of shape ", logits_sizes,
                ", got shape ", target_sizes);
    TORCH_CHECK_VALUE(target.dim() == 0 || target_sizes[0] == 1, loss,
                      ": target must be one class index for input of shape ", logits_sizes, ", got shape ",
                      target_sizes);
  } else {
    TORCH_CHECK_VALUE(target.dim() > 0 && target_sizes[0] == logits_sizes[0], loss, ": target's batch size (shape ",
                      target_sizes, ") must be that of input (shape ", logits_sizes, ")");
    const auto expected = position_sizes(logits);
    TORCH_CHECK(target_sizes == c10::SymIntArrayRef(expected), loss, ": target must have the shape ",
                c10::SymIntArrayRef(expected), " (input's shape ", logits_sizes, " without the classes), got ",
                target_sizes);
    check_type();
  }
}

void check_class_weight(const char* loss, const Tensor& logits, OptionalTensor weight, bool beside_indices) {
  if (!is_present(weight)) return;
  const auto classes = logits.sym_size(class_dim(logits));
  const bool fits = (weight->dim() == 1 || (beside_indices && logits.dim() > 2)) && weight->sym_numel() == classes;
  TORCH_CHECK(fits, loss, ": weight must have the shape [", classes, "], one element per class, got ",
              weight->sym_sizes());
}

void check_weight_type(const char* loss, const Tensor& logits, OptionalTensor weight, bool upcast) {
  if (!is_present(weight)) return;
  const auto expected = logits.scalar_type();
  TORCH_CHECK(upcast_type(weight->scalar_type(), upcast) == upcast_type(expected, upcast), loss,
              ": weight must have the input's type ", expected, ", got ", type_and_shape(*weight));
}

void check_in_bounds(const char* loss, int64_t classes, const Tensor& target, int64_t position) {
  if (position < 0) return;
  // On the CPU only: kernels of other devices report no position, and nothing is read back from them.
  const int64_t value = target.reshape({-1}).select(0, position).item().toLong();
  TORCH_CHECK_INDEX(false, loss, ": target ", value, " at position ", position, " is out of bounds for ", classes,
                    " classes");
}

void check_targets(const char* loss, int64_t classes, const Tensor& target, int64_t ignore_index) {
  if (!target.is_cpu()) return;
  const Tensor index = target.to(at::kLong).flatten();
  const Tensor invalid = index.lt(0).logical_or_(index.ge(classes)).logical_and_(index.ne(ignore_index));
  const Tensor positions = invalid.nonzero();
  if (positions.size(0) > 0) check_in_bounds(loss, classes, target, positions[0].item<int64_t>());
}

Tensor empty_like_logits(const Tensor& logits) {
  Tensor result = at::empty_like(logits);
  return inner_dims_merge(result) ? result : at::empty_like(logits, at::MemoryFormat::Contiguous);
}

Tensor addressable(const Tensor& tensor) { return inner_dims_merge(tensor) ? tensor : tensor.contiguous(); }

void fill_class_views(ClassShape& shape, std::initializer_list<ClassOperand> operands) {
  const Tensor& first = operands.begin()->tensor;
  shape.classes = first.size(class_dim(first));
  shape.outer = first.dim() == 1 ? 1 : first.size(0);
  shape.inner = 1;
  for (int64_t d = 2; d < first.dim(); ++d) shape.inner *= first.size(d);

  bool merge = shape.outer > 1;
  for (const auto& [tensor, view] : operands) {
    if (!tensor.defined()) continue;
    view.data = tensor.data_ptr();
    view.dtype = dtype_of(tensor.scalar_type());
    view.outer_stride = tensor.dim() == 1 ? 0 : tensor.stride(0);
    view.class_stride = tensor.stride(class_dim(tensor));
    view.inner_stride = inner_stride(tensor)->expect_int();
    merge = merge && (shape.inner == 1 || view.outer_stride == shape.inner * view.inner_stride);
  }
  if (!merge) return;
  for (const auto& [tensor, view] : operands) {
    if (shape.inner == 1) view.inner_stride = view.outer_stride;
  }
  shape.inner *= shape.outer;
  shape.outer = 1;
}

Tensor position_view(const Tensor& tensor, PositionTensor& view) {
  Tensor flat = tensor.contiguous();
  view.data = flat.data_ptr();
  view.dtype = dtype_of(flat.scalar_type());
  view.stride = flat.dim() == 0 ? 0 : 1;
  return flat;
}

Tensor weight_view(OptionalTensor weight, at::ScalarType dtype, const void*& view) {
  if (!is_present(weight)) return Tensor();
  Tensor flat = weight->to(accumulate_type(dtype)).contiguous();
  view = flat.const_data_ptr();
  return flat;
}

}  // namespace fusedloss::ops
