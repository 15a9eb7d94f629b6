// The CUDA kernels: for each loss, how much workspace a pass needs and how to launch it. No CUDA header is needed to
// include this file. All pointers in the arguments are of the current device, whose stream is the last argument; what
// goes wrong in launching throws std::runtime_error. A target that is no class, or a value that a loss refuses, is a
// device-side assertion, as in native torch.

#pragma once

#include <cstddef>

#include "../class_loss.h"
#include "../elementwise.h"

namespace fusedloss::cuda {

template <class Args>
struct Loss {
  std::size_t (*workspace_bytes)(const Args& args, Pass pass);
  void (*launch)(const Args& args, Pass pass, void* workspace, void* stream);
};

struct Kernels {
  Loss<CrossEntropyArgs> cross_entropy;
  Loss<NllArgs> nll;
  Loss<ElementwiseArgs> bce_with_logits;
  Loss<ElementwiseArgs> bce;
};

extern const Kernels kKernels;

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

}  // namespace fusedloss::cuda
