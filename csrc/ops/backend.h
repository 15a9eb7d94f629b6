// Which kernels the operators run. A backend is a namespace of operators: torch.ops.fusedloss has the compiled kernels
// (csrc/kernels/cpu, csrc/kernels/cuda), torch.ops.fusedloss_triton those of fusedloss/triton. Both namespaces hold the
// same functions, registered under the backend that they are to run.

#pragma once

namespace fusedloss::ops {

enum class Backend { compiled, triton };

constexpr const char* namespace_of(Backend backend) {
  return backend == Backend::triton ? "fusedloss_triton" : "fusedloss";
}

// The backend of the operator that this thread is in.
Backend current_backend();

class BackendGuard {
 public:
  explicit BackendGuard(Backend backend);
  ~BackendGuard();
  BackendGuard(const BackendGuard&) = delete;
  BackendGuard& operator=(const BackendGuard&) = delete;

 private:
  const Backend outer_;
};

}  // namespace fusedloss::ops
