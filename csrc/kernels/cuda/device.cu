#include "device.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
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

// --- What a device says of a kernel ---

// Answers of the runtime, each asked for once. Not while the lock is held: the runtime may wait for the device, which
// may wait for a launch of another thread, which would wait for the lock. Two threads may ask the same.
template <class Key, class Answer>
class Answers {
 public:
  template <class Ask>
  Answer of(const Key& key, Ask ask) {
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = answers_.find(key); found != answers_.end()) return found->second;
    }
    const Answer answer = ask();
    const std::lock_guard lock(mutex_);
    return answers_.try_emplace(key, answer).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Answer> answers_;
};

// Lets the kernel have all the dynamic shared memory that there is beside its static: once, and before anything else is
// asked or launched. A limit that each launch set for itself would be lowered under the feet of another thread's. Says
// whether the code is compiled for clusters; that of an older architecture, translated by the driver, is not.
bool opt_in(int device, const void* kernel) {
  // By device, each of which has a copy of the kernels. Never destroyed: a thread may launch while the process ends.
  static auto& answers = *new Answers<std::pair<int, const void*>, bool>;
  return answers.of({device, kernel}, [&] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int(attributes.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
    return attributes.ptxVersion >= 90;
  });
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

// How many blocks one multiprocessor holds, or how many clusters the whole device.
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
  const cudaError_t status = cudaOccupancyMaxActiveClusters(&count, kernel, &configuration.config);
  if (status == cudaErrorInvalidClusterSize) {  // a part of a device may refuse one instead of having no room for it
    cudaGetLastError();
    return 0;
  }
  check(status, "cudaOccupancyMaxActiveClusters");
  return std::int64_t(count) * shape.cluster;
}

const Device& real_device() {
  static const std::vector<Device>& devices = *new std::vector<Device>([] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<Device> all;
    for (int device = 0; device < count; ++device) all.push_back(describe(device));
    return all;
  }());
  return devices[current_index()];
}

}  // namespace

const Device& current_device() { return pretended_device ? *pretended_device : real_device(); }

constinit thread_local const Device* pretended_device = nullptr;

std::int64_t resident_blocks(const void* kernel, const Launch& shape) {
  using Key = std::tuple<int, const void*, int, std::size_t, int>;
  static auto& blocks_of_shapes = *new Answers<Key, std::int64_t>;
  const Device& device = current_device();
  if (shape.cluster > device.largest_cluster) return 0;
  const int index = current_index();
  const Key key{index, kernel, shape.threads, shape.shared_bytes, shape.cluster};
  const std::int64_t blocks = blocks_of_shapes.of(key, [&] {
    // A kernel that has not opted in has no room for more than 48 KB.
    const bool knows_clusters = opt_in(index, kernel);
    return shape.cluster > 1 && !knows_clusters ? 0 : ask_for_blocks(kernel, shape);
  });
  if (shape.cluster == 1) return blocks * device.multiprocessors;
  if (!pretended_device || blocks == 0) return blocks;
  const std::int64_t clusters = blocks / shape.cluster * device.multiprocessors / real_device().multiprocessors;
  return std::max<std::int64_t>(clusters, 1) * shape.cluster;
}

void launch(const char* name, const void* kernel, const Launch& shape, void* stream, void** arguments) {
  if (shape.shared_bytes > 0) {
    if (shape.shared_bytes > current_device().dynamic_shared) {
      throw std::runtime_error(std::string("fusedloss, CUDA, ") + name + ": " + std::to_string(shape.shared_bytes) +
                               " bytes of shared memory, of which a block here can have " +
                               std::to_string(current_device().dynamic_shared));
    }
    opt_in(current_index(), kernel);
  }
  const Configuration configuration(shape, stream);
  check(cudaLaunchKernelExC(&configuration.config, kernel, arguments), name);
}

}  // namespace fusedloss::cuda
