// Where a large result is going to be written.

#pragma once

#include <ATen/core/Tensor.h>

namespace fusedloss::ops {

// Returns the tensor, which has just been allocated, after asking the system for huge pages behind it. Without them the
// first write to a large result spends most of its time on page faults. A hint: nothing depends on it, small tensors
// and other systems than Linux ignore it.
at::Tensor with_huge_pages(at::Tensor fresh);

}  // namespace fusedloss::ops
