// The host side of a launch: what is known of the device, and a launch that is checked.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fusedloss::cuda {

struct Device {
  int multiprocessors;
  std::size_t shared_per_block;  // the most that a kernel can opt in to
  std::size_t shared_per_multiprocessor;
  bool clusters;  // blocks can read each other's shared memory
};

// Throws std::runtime_error that names what failed.
void check(cudaError_t status, const char* what);

// The current one. Its properties are asked for once.
const Device& current_device();

struct Launch {
  std::int64_t blocks = 1;
  int threads = 128;
  std::size_t shared_bytes = 0;
  int cluster = 1;  // blocks in a cluster; 1 needs no device that has them
};

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& shape, void* stream,
            const Parameters&... arguments) {
  constexpr std::size_t kWithoutOptingIn = 48 * 1024;
  if (shape.shared_bytes > kWithoutOptingIn) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes)), name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace fusedloss::cuda
