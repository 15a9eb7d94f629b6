// Checks that every loss makes. A message names the loss and the argument and shows the offending value; the
// exception's type is the one native torch raises.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "options.h"

namespace fusedloss::ops {

inline bool is_present(OptionalTensor tensor) { return tensor.has_value() && tensor->defined(); }

inline std::optional<at::Tensor> to_optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

struct NamedTensor {
  const char* name;
  const at::Tensor* tensor;  // null: absent

  NamedTensor(const char* name, const at::Tensor& tensor) : name(name), tensor(&tensor) {}
  NamedTensor(const char* name, OptionalTensor tensor) : name(name), tensor(is_present(tensor) ? &*tensor : nullptr) {}
};

// What a message says that it has got.
inline std::string type_and_shape(const at::Tensor& tensor) {
  return c10::str(tensor.scalar_type(), " of shape ", tensor.sym_sizes());
}

inline void check_reduction(const char* loss, Reduction reduction) {
  TORCH_CHECK_VALUE(reduction >= Reduction::none && reduction <= Reduction::sum, loss,
                    ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", static_cast<int64_t>(reduction));
}

// The first tensor's device is the expected one.
inline void check_devices(const char* loss, std::initializer_list<NamedTensor> tensors) {
  const NamedTensor& first = *tensors.begin();
  for (const NamedTensor& other : tensors) {
    TORCH_CHECK(!other.tensor || other.tensor->device() == first.tensor->device(), loss, ": ", other.name, " is on ",
                other.tensor->device(), ", but ", first.name, " is on ", first.tensor->device());
  }
}

// Sparse, nested and quantized tensors would fail where their sizes, strides or memory are first asked for.
inline void check_dense(const char* loss, std::initializer_list<NamedTensor> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (!tensor) continue;
    const bool dense = tensor->layout() == at::kStrided && !tensor->is_nested() && !tensor->is_quantized();
    const char* kind = tensor->is_nested() ? "nested " : tensor->is_quantized() ? "quantized " : "";
    TORCH_CHECK_NOT_IMPLEMENTED(dense, loss, ": ", name, " must be a dense tensor, got a ", kind, "tensor of layout ",
                                tensor->layout(), " and type ", tensor->scalar_type());
  }
}

inline bool is_supported_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline void check_floating(const char* loss, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported_floating(tensor.scalar_type()), loss, ": ", name,
                              " must be float32, float64, bfloat16 or float16, got ", type_and_shape(tensor));
}

inline void check_real(const char* loss, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(!at::isComplexType(tensor.scalar_type()), loss, ": ", name, " must be real, got ",
              type_and_shape(tensor));
}

// A weight that is promoted, not one that must have the input's type.
inline void check_weight(const char* loss, const char* name, const at::Tensor& weight) {
  check_real(loss, name, weight);
  if (!at::isIntegralType(weight.scalar_type(), /*includeBool=*/true)) check_floating(loss, name, weight);
}

// What every backward operator is given: the gradient of the loss, in the loss's shape, and forward's divisor.
inline void check_grad_loss(const char* loss, const at::Tensor& input, const at::Tensor& grad_loss,
                            const at::Tensor& divisor, Reduction reduction, c10::SymIntArrayRef unreduced_sizes) {
  check_devices(loss, {{"input", input}, {"grad_loss", grad_loss}, {"divisor", divisor}});
  check_floating(loss, "grad_loss", grad_loss);
  const bool reduced = reduction != Reduction::none;
  TORCH_CHECK(grad_loss.sym_sizes() == (reduced ? c10::SymIntArrayRef() : unreduced_sizes), loss,
              ": grad_loss must have the loss's shape, got ", grad_loss.sym_sizes());
  TORCH_CHECK(divisor.scalar_type() == at::kDouble && divisor.dim() == 0, loss, ": divisor must be one float64, got ",
              type_and_shape(divisor));
}

// What every operator that computes loss and gradient in one pass is given.
inline void check_with_grad(const char* loss, const at::Tensor& input, const at::Tensor& grad,
                            OptionalTensor grad_scale, OptionalTensor scale, Reduction reduction) {
  check_devices(loss, {{"input", input}, {"grad", grad}, {"grad_scale", grad_scale}, {"scale", scale}});
  TORCH_CHECK_VALUE(reduction != Reduction::none, loss, ": an unreduced loss has no gradient in forward");
  TORCH_CHECK(grad.sym_sizes() == input.sym_sizes() && grad.scalar_type() == input.scalar_type(), loss,
              ": grad must have the input's type and shape ", input.sym_sizes(), ", got ", type_and_shape(grad));
  TORCH_CHECK(
      !is_present(grad_scale) || (grad_scale->sym_numel() == 1 && at::isFloatingType(grad_scale->scalar_type())), loss,
      ": grad_scale must be one floating-point number, got ", type_and_shape(*grad_scale));
  TORCH_CHECK(is_present(scale) || !is_present(grad_scale), loss, ": grad_scale needs a place for scale");
  TORCH_CHECK(!is_present(scale) || (scale->dim() == 0 && scale->scalar_type() == at::kDouble), loss,
              ": scale must be one float64, got ", type_and_shape(*scale));
}

}  // namespace fusedloss::ops
