// Checks that every loss makes. A message names the loss and the argument and shows the offending value; the
// exception's type is the one native torch raises.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "../kernels/types.h"

namespace fusedloss::ops {

struct NamedTensor {
  const char* name;
  const at::Tensor* tensor;  // null: absent

  NamedTensor(const char* name, const at::Tensor& tensor) : name(name), tensor(&tensor) {}
  NamedTensor(const char* name, const std::optional<at::Tensor>& tensor)
      : name(name), tensor(tensor.has_value() && tensor->defined() ? &*tensor : nullptr) {}
};

inline bool is_present(const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

inline void check_reduction(const char* loss, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 2, loss, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ",
                    reduction);
}

// The first tensor's device is the expected one.
inline void check_devices(const char* loss, std::initializer_list<NamedTensor> tensors) {
  const NamedTensor& first = *tensors.begin();
  for (const NamedTensor& other : tensors) {
    TORCH_CHECK(!other.tensor || other.tensor->device() == first.tensor->device(), loss, ": ", other.name, " is on ",
                other.tensor->device(), ", but ", first.name, " is on ", first.tensor->device());
  }
}

inline bool is_supported_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline void check_floating(const char* loss, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_supported_floating(tensor.scalar_type()), loss, ": ", name,
                              " must be float32, float64, bfloat16 or float16, got ", tensor.scalar_type());
}

}  // namespace fusedloss::ops
