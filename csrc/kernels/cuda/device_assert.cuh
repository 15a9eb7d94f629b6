// Device-side assertions. Active in every build: NDEBUG, which CMake's release builds define, would drop them, and what
// they refuse would be used.

#pragma once

#undef NDEBUG
#include <cassert>

namespace fusedloss::cuda {

// Stops the kernel, and with it the context: the next call that waits for the device raises, as with native torch.
__device__ __forceinline__ void device_assert(bool target_or_value_is_valid) {
  if (!target_or_value_is_valid) {
    assert(target_or_value_is_valid);
    __builtin_unreachable();
  }
}

}  // namespace fusedloss::cuda
