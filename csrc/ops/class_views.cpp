#include "class_views.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "checks.h"
#include "launch.h"

namespace fusedloss::ops {
namespace {

// Whether dimensions 2 and up can be walked with one stride.
bool inner_dims_merge(const Tensor& tensor) {
  if (tensor.dim() <= 3) return true;
  const auto sizes = tensor.sym_sizes();
  const auto strides = tensor.sym_strides();
  std::optional<c10::SymInt> expected;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (sizes[d] == 1) continue;
    if (expected.has_value() && strides[d] != *expected) return false;
    expected = strides[d] * sizes[d];
  }
  return true;
}

int64_t inner_stride(const Tensor& tensor) {
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (tensor.size(d) != 1) return tensor.stride(d);
  }
  return 0;
}

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

void raise_target_out_of_bounds(const char* loss, const Tensor& logits, const Tensor& target, int64_t position) {
  // On the CPU only: kernels of other devices report no position, and nothing is read back from them.
  const int64_t value = target.reshape({-1}).select(0, position).item().toLong();
  TORCH_CHECK_INDEX(false, loss, ": target ", value, " at position ", position, " is out of bounds for ",
                    logits.size(class_dim(logits)), " classes");
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
    view.data = tensor.data_ptr();
    view.dtype = dtype_of(tensor.scalar_type());
    view.outer_stride = tensor.dim() == 1 ? 0 : tensor.stride(0);
    view.class_stride = tensor.stride(class_dim(tensor));
    view.inner_stride = inner_stride(tensor);
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

Tensor accumulate_weight(OptionalTensor weight, at::ScalarType dtype) {
  return is_present(weight) ? weight->to(accumulate_type(dtype)).contiguous() : Tensor();
}

}  // namespace fusedloss::ops
