// The host side of a launch: what is known of the device and of a kernel on it, and a launch that is checked.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda.h"

namespace fusedloss::cuda {

// No kernel has more static shared memory (tools/kernel_resources.py holds the compiled ones to it). Dynamic shared
// memory is planned beside it: a launch whose sum exceeds what a block can have fails.
inline constexpr std::size_t kStaticSharedBytes = 4 * 1024;

// Blocks of one cluster that every device with clusters can launch.
inline constexpr int kLargestCluster = 8;

struct Device {
  int multiprocessors;
  std::size_t dynamic_shared;  // the most bytes that a launch here may ask for
  std::size_t shared_per_multiprocessor;
  int largest_cluster;  // of blocks that can read each other's shared memory; 1: there are no clusters
};

// Throws std::runtime_error that names what failed. The runtime forgets the error: the next one who asks it for the
// last error would be blamed for ours.
void check(cudaError_t status, const char* what);

// The current one. Its properties are asked for once.
const Device& current_device();

// For tests: while it lives, this thread plans its launches as for such a device.
class PretendedDevice {
 public:
  explicit PretendedDevice(const Device& device);
  ~PretendedDevice();
  PretendedDevice(const PretendedDevice&) = delete;

 private:
  const Device device_;
  const Device* const before_;
};

// A kernel, as the runtime takes it where its parameters do not matter.
template <class... Parameters>
const void* address_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

// Whether the code that this device runs is compiled for clusters. Code of an older architecture that the driver has
// translated knows none.
bool is_compiled_for_clusters(const void* kernel);

// How many blocks of this shape the current device holds at once; 0 where it has no place for a cluster of them. The
// runtime is asked once for each kernel and shape.
std::int64_t resident_blocks(const void* kernel, const Launch& shape);

// For blocks that take turns at the work: as many as there are units of it, and no more than run at once. One more
// would start when others end, and the device would wait for it.
inline std::int64_t blocks_for(std::int64_t units, const void* kernel, const Launch& shape) {
  return std::max<std::int64_t>(1, std::min(units, resident_blocks(kernel, shape)));
}

void launch(const char* name, const void* kernel, const Launch& shape, void* stream, void** arguments);

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& shape, void* stream,
            const std::type_identity_t<Parameters>&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  launch(name, address_of(kernel), shape, stream, pointers);
}

}  // namespace fusedloss::cuda
