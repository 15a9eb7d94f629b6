#include "device.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedloss::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("fusedloss, CUDA, ") + what + ": " + cudaGetErrorString(status));
}

namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

Device describe(int device) {
  return {.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
          .shared_per_block = std::size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
          .shared_per_multiprocessor = std::size_t(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)),
          .clusters = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9};
}

}  // namespace

const Device& current_device() {
  static const std::vector<Device> devices = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<Device> all;
    for (int device = 0; device < count; ++device) all.push_back(describe(device));
    return all;
  }();
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return devices[device];
}

}  // namespace fusedloss::cuda
