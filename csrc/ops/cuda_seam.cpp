#include "launch.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace fusedloss::ops {

bool runs_on_cuda(const at::Tensor& tensor) { return !tensor.is_cpu(); }

#if defined(FUSEDLOSS_WITH_CUDA)

const Losses<cuda::Loss>& cuda_kernels() { return cuda::kKernels; }
void cuda_rescale(const cuda::RescaleArgs& args, void* stream) { cuda::rescale(args, stream); }
std::vector<int64_t> cuda_class_borders(const cuda::ClassProblem& problem, int64_t most) {
  return cuda::class_borders(problem, most);
}

#else

const Losses<cuda::Loss>& cuda_kernels() {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "fusedloss is built without CUDA kernels; build it with FUSEDLOSS_CUDA=1");
}
void cuda_rescale(const cuda::RescaleArgs&, void*) { cuda_kernels(); }
std::vector<int64_t> cuda_class_borders(const cuda::ClassProblem&, int64_t) {
  cuda_kernels();
  return {};
}

#endif

void* current_stream(at::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getStream(device).native_handle();
}

}  // namespace fusedloss::ops
