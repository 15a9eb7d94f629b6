// How often each operator of a loss has been run, and by whose kernels: what fusedloss.report() tells. It is counted
// here and not in Python, since compiled graphs call nothing else, and a compiler would guard a counter in Python.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "backend.h"

namespace fusedloss::ops {

enum class Route { cpu, cuda, triton, second_derivative };
constexpr std::array kRoutes{"cpu", "cuda", "triton", "second derivative"};

class Calls {
 public:
  void count(Route route) { counts_[static_cast<std::size_t>(route)].fetch_add(1, std::memory_order_relaxed); }

  // Of an operator, by its name with or without the namespace: those of both backends share them.
  static Calls& of_operator(const std::string& name);
  using Counts = std::map<std::string, int64_t>;  // by the names of kRoutes
  static std::map<std::string, Counts> all();

 private:
  std::array<std::atomic<int64_t>, kRoutes.size()> counts_{};
};

// Where an operator is called by another's backward, and nobody has asked for the loss.
inline constinit thread_local bool counts_calls = true;

class NoCalls {
 public:
  NoCalls() : outer_(std::exchange(counts_calls, false)) {}
  ~NoCalls() { counts_calls = outer_; }
  NoCalls(const NoCalls&) = delete;
  NoCalls& operator=(const NoCalls&) = delete;

 private:
  const bool outer_;
};

// Tensors without elements run no kernel, and neither do a compiler's, which are meta tensors here.
inline void count_call(Calls& calls, Backend backend, const at::Tensor& input) {
  if (input.is_meta() || input.numel() == 0 || !counts_calls) return;
  calls.count(backend == Backend::triton ? Route::triton : input.is_cuda() ? Route::cuda : Route::cpu);
}

}  // namespace fusedloss::ops
