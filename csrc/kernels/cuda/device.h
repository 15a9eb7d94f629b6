// The host side of a launch: what is known of the device and of a kernel on it, and a launch that is checked.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "plan.h"

namespace fusedloss::cuda {

// Throws std::runtime_error that names what failed. The runtime forgets the error: the next one who asks it for the
// last error would be blamed for ours.
void check(cudaError_t status, const char* what);

// The current one. Its properties are asked for once.
const Device& current_device();

// For tests: unless it is null, this thread plans its launches as for such a device.
extern constinit thread_local const Device* pretended_device;

// A kernel, as the runtime takes it where its parameters do not matter.
template <class... Parameters>
const void* address_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

// How many blocks of this shape the current device holds at once; 0 where it has no place for a cluster of them, or the
// code that it runs is not compiled for them. The runtime is asked once for each kernel and shape.
std::int64_t resident_blocks(const void* kernel, const Launch& shape);

// For blocks without dynamic shared memory that take turns at so many units of work.
template <class... Parameters>
Launch in_turns(void (*kernel)(Parameters...), int threads, std::int64_t units) {
  Launch shape{.threads = threads};
  shape.blocks = blocks_for(units, resident_blocks(address_of(kernel), shape));
  return shape;
}

void launch(const char* name, const void* kernel, const Launch& shape, void* stream, void** arguments);

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& shape, void* stream,
            const std::type_identity_t<Parameters>&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  launch(name, address_of(kernel), shape, stream, pointers);
}

}  // namespace fusedloss::cuda
