#include "backend.h"

#include "launch.h"

namespace fusedloss::ops {

static thread_local Backend backend = Backend::compiled;

Backend current_backend() { return backend; }
BackendGuard::BackendGuard(Backend inner) : outer_(backend) { backend = inner; }
BackendGuard::~BackendGuard() { backend = outer_; }

TritonKernels& triton_kernels() {
  // Never destroyed: the interpreter that the launchers belong to may be gone by then.
  static auto& kernels = *new TritonKernels();
  return kernels;
}

}  // namespace fusedloss::ops
