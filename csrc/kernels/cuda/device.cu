#include "device.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace fusedloss::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
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
          .dynamic_shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kStaticSharedBytes,
          .shared_per_multiprocessor = std::size_t(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)),
          .largest_cluster = attribute(cudaDevAttrClusterLaunch, device) ? kLargestCluster : 1};
}

int current_index() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

thread_local const Device* pretended = nullptr;

// --- What a device says of a kernel ---

struct Facts {
  bool clusters;  // the code is compiled for them
};

// Both by device, of which each has a copy of the kernels.
std::mutex facts_mutex;
std::map<std::pair<int, const void*>, Facts> facts_of_kernels;
std::map<std::tuple<int, const void*, int, std::size_t, int>, std::int64_t> blocks_of_shapes;

// Lets the kernel have all the dynamic shared memory that there is beside its static: once, and before anything else is
// asked or launched. A limit that each launch set for itself would be lowered under the feet of another thread's.
const Facts& facts_of(int device, const void* kernel) {
  const auto [found, is_new] = facts_of_kernels.try_emplace({device, kernel});
  if (!is_new) return found->second;
  try {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int(attributes.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
    found->second.clusters = attributes.ptxVersion >= 90;
  } catch (...) {
    facts_of_kernels.erase(found);
    throw;
  }
  return found->second;
}

// What the runtime takes for a shape; refers to itself.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  Configuration(const Launch& shape, void* stream) {
    config.gridDim = dim3(unsigned(shape.blocks));
    config.blockDim = dim3(unsigned(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(shape.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  Configuration(const Configuration&) = delete;
};

// Of one multiprocessor; of clusters, on the whole device.
std::int64_t ask_for_blocks(const void* kernel, const Launch& shape) {
  int count = 0;
  if (shape.cluster == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, shape.threads, shape.shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return count;
  }
  Launch one = shape;
  one.blocks = shape.cluster;
  const Configuration configuration(one, nullptr);
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &configuration.config), "cudaOccupancyMaxActiveClusters");
  return std::int64_t(count) * shape.cluster;
}

}  // namespace

const Device& current_device() {
  if (pretended) return *pretended;
  static const std::vector<Device> devices = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<Device> all;
    for (int device = 0; device < count; ++device) all.push_back(describe(device));
    return all;
  }();
  return devices[current_index()];
}

PretendedDevice::PretendedDevice(const Device& device) : device_(device), before_(pretended) { pretended = &device_; }
PretendedDevice::~PretendedDevice() { pretended = before_; }

bool is_compiled_for_clusters(const void* kernel) {
  const std::lock_guard lock(facts_mutex);
  return facts_of(current_index(), kernel).clusters;
}

std::int64_t resident_blocks(const void* kernel, const Launch& shape) {
  if (shape.cluster > current_device().largest_cluster) return 0;
  const int device = current_index();
  const std::lock_guard lock(facts_mutex);
  facts_of(device, kernel);
  const auto [found, is_new] =
      blocks_of_shapes.try_emplace({device, kernel, shape.threads, shape.shared_bytes, shape.cluster});
  if (is_new) {
    try {
      found->second = ask_for_blocks(kernel, shape);
    } catch (...) {
      blocks_of_shapes.erase(found);
      throw;
    }
  }
  return shape.cluster > 1 ? found->second : found->second * current_device().multiprocessors;
}

void launch(const char* name, const void* kernel, const Launch& shape, void* stream, void** arguments) {
  if (shape.shared_bytes > 0) {
    if (shape.shared_bytes > current_device().dynamic_shared) {
      throw std::runtime_error(std::string("fusedloss, CUDA, ") + name + ": " + std::to_string(shape.shared_bytes) +
                               " bytes of shared memory, of which a block here can have " +
                               std::to_string(current_device().dynamic_shared));
    }
    const std::lock_guard lock(facts_mutex);
    facts_of(current_index(), kernel);
  }
  const Configuration configuration(shape, stream);
  check(cudaLaunchKernelExC(&configuration.config, kernel, arguments), name);
}

}  // namespace fusedloss::cuda
