// Memory that a thread keeps between calls, for intermediate results that are too large for the stack.

#pragma once

#include <cstddef>

namespace fusedloss::cpu {

// At least `bytes` bytes, aligned to a cache line; what the thread asked for before is invalid from then on.
void* scratch(std::size_t bytes);

}  // namespace fusedloss::cpu
