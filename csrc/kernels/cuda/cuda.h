// The CUDA kernels: for each loss, the launch of a pass. No CUDA header is needed to include this file. All pointers in
// the arguments are of the current device, whose stream is the last argument; what goes wrong in launching throws
// std::runtime_error. A target that is no class, or a value that a loss refuses, is a device-side assertion, as in
// native torch.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "../losses.h"

namespace fusedloss::cuda {

// Device memory of so many bytes, aligned to 16, that is left alone until the launch has run on its stream. A launch
// asks once, or not at all if it needs no workspace.
using Allocate = std::function<void*(std::size_t bytes)>;

template <class Args>
struct Loss {
  void (*launch)(const Args& args, Pass pass, const Allocate& allocate, void* stream);
};

extern const Losses<Loss> kKernels;

// A gradient that was written for the grad_output `scale` (null: 1), made one for `grad_output`. The kernel reads both
// and returns where they are equal.
struct RescaleArgs {
  void* grad = nullptr;  // (numel,)
  Dtype dtype = Dtype::float32;
  std::int64_t numel = 0;
  const void* grad_output = nullptr;  // one element
  Dtype grad_output_dtype = Dtype::float32;
  const double* scale = nullptr;  // one element
  bool keep_zeros = false;        // zeros stay zeros, whatever flows back
};

void rescale(const RescaleArgs& args, void* stream);

// A cross entropy of any number of classes.
struct ClassProblem {
  Dtype dtype = Dtype::float32;
  Pass pass = Pass::forward;
  bool columns = false;  // positions lie side by side; else classes do
  bool general = false;  // with label smoothing
  std::int64_t positions = 1;
};

// The numbers of classes, up to `most`, from which on another kernel is launched, or the same in another way, or with
// more shared memory than without opting in. Tests are made of these: what goes wrong, goes wrong at a border.
std::vector<std::int64_t> class_borders(const ClassProblem& problem, std::int64_t most);

}  // namespace fusedloss::cuda
