// Memory of callers that inplace=True has overwritten with gradients, for as long as backward needs them.
//
// All views of a tensor have one version counter, so autograd would take a loss that overwrites one of them for a
// change of all the others, and refuse two heads of one output. A claim knows which memory is whose: another loss may
// overwrite what does not overlap it, and any other change of the counter is one that backward must not miss.

#pragma once

#include <ATen/core/Tensor.h>

namespace fusedloss::ops {

// Raises if `input` overlaps itself, or memory that is claimed.
void check_unclaimed(const char* loss, const at::Tensor& input);

// Claims the memory of `input`, which has been overwritten, as that of `grad`, a tensor over the same memory with a
// version counter of its own. The claim lasts until it is released, and no longer than `grad`; or than the memory,
// where hooks may keep the one without the other.
int64_t claim(const at::Tensor& input, const at::Tensor& grad, bool hooks);
void release_claim(int64_t claim);

// Raises if anybody has written to the memory since it was claimed.
void check_claim(const char* loss, int64_t claim);

}  // namespace fusedloss::ops
