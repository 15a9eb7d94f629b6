// Which kernels the operators run. A backend is a namespace of operators: torch.ops.fusedloss has the compiled kernels
// (csrc/kernels/cpu, csrc/kernels/cuda), torch.ops.fusedloss_triton those of fusedloss/triton. Both namespaces hold the
// same functions, registered under the backend that they are to run.

#pragma once

#include <utility>

namespace fusedloss::ops {

enum class Backend { compiled, triton };

// The backend of the operator that this thread is in.
inline constinit thread_local Backend current_backend = Backend::compiled;

class BackendGuard {
 public:
  explicit BackendGuard(Backend inner) : outer_(std::exchange(current_backend, inner)) {}
  ~BackendGuard() { current_backend = outer_; }
  BackendGuard(const BackendGuard&) = delete;
  BackendGuard& operator=(const BackendGuard&) = delete;

 private:
  const Backend outer_;
};

}  // namespace fusedloss::ops
