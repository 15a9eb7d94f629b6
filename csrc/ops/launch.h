// From a filled argument struct to a running kernel.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "../kernels/cpu/cpu.h"
#include "../kernels/cuda/cuda.h"
#include "backend.h"
#include "checks.h"
#include "losses.h"

namespace fusedloss::ops {

// The type of each Dtype, in their order.
constexpr std::array kScalarTypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kByte,
                                  at::kChar,  at::kShort,  at::kInt,      at::kLong};

// What kernels read a type as; absent: none of them reads it.
inline std::optional<Dtype> readable_as(at::ScalarType type) {
  if (type == at::kBool) return Dtype::uint8;
  const auto found = std::find(kScalarTypes.begin(), kScalarTypes.end(), type);
  return found != kScalarTypes.end() ? std::optional(static_cast<Dtype>(found - kScalarTypes.begin())) : std::nullopt;
}

// What kernels read a type as that the checks have let through.
inline Dtype dtype_of(at::ScalarType type) {
  const auto dtype = readable_as(type);
  TORCH_INTERNAL_ASSERT(dtype.has_value(), "no kernel reads ", type);
  return *dtype;
}

// The type that sums, row statistics and class weights have.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// What kernels are to read for a loss of this type: a float64 loss is computed in float64, whatever the input's type.
inline at::Tensor widened(const at::Tensor& input, at::ScalarType loss_type) {
  return loss_type == at::kDouble ? input.to(at::kDouble) : input;
}

inline at::ScalarType upcast_type(at::ScalarType type, bool upcast) {
  return upcast && (type == at::kBFloat16 || type == at::kHalf) ? at::kFloat : type;
}

inline cpu::InstructionSet instruction_set(const std::string& capability) {
  if (capability == "AVX512") return cpu::InstructionSet::avx512;
  return capability == "AVX2" ? cpu::InstructionSet::avx2 : cpu::InstructionSet::baseline;
}

// Follows ATEN_CPU_CAPABILITY, as native kernels do.
inline const Losses<cpu::Loss>& cpu_kernels() {
  static const Losses<cpu::Loss>& chosen = cpu::kernels(instruction_set(at::get_cpu_capability()));
  return chosen;
}

// Starts a pass on the stream that is current where `input` lies; workspace is the launcher's own affair.
template <class Args>
using TritonLaunch = std::function<void(const Args& args, Pass pass, const at::Tensor& input)>;

// The Triton kernels, which Python brings (csrc/triton.cpp). Empty until then: a call raises.
struct TritonKernels : Losses<TritonLaunch> {
  std::function<void(const cuda::RescaleArgs& args, const at::Tensor& grad)> rescale;
};
inline TritonKernels& triton_kernels() {
  // Never destroyed: the interpreter that the launchers belong to may be gone by then.
  static auto& kernels = *new TritonKernels();
  return kernels;
}

template <class... Arguments>
void launch_triton(const std::function<void(Arguments...)>& launch, std::type_identity_t<Arguments>... arguments) {
  TORCH_CHECK_NOT_IMPLEMENTED(launch, "fusedloss's Triton kernels are not loaded; import fusedloss.triton first");
  launch(arguments...);
}

// A loss's kernels on each backend, chosen from their tables by one function that serves them all:
// [](const auto& losses) -> const auto& { return losses.NAME; }.
template <class Args>
struct LossKernels {
  template <class Choose>
  constexpr LossKernels(Choose choose) : cpu(choose), cuda(choose), triton(choose) {}

  const cpu::Loss<Args>& (*cpu)(const Losses<cpu::Loss>&);
  const cuda::Loss<Args>& (*cuda)(const Losses<cuda::Loss>&);
  const TritonLaunch<Args>& (*triton)(const TritonKernels&);
};

// Whether a tensor is the CUDA kernels' business, under the compiled backend.
bool runs_on_cuda(const at::Tensor& tensor);

// These raise in a build without CUDA kernels. The borders are for the tests in Python.
const Losses<cuda::Loss>& cuda_kernels();
void cuda_rescale(const cuda::RescaleArgs& args, void* stream);
std::vector<std::int64_t> cuda_class_borders(const cuda::ClassProblem& problem, std::int64_t most);

// The current stream of a device, as its kernels take it.
void* current_stream(at::Device device);

inline void parallel_for(int64_t count, const cpu::Work& work) { at::parallel_for(0, count, 1, work); }

// Runs the kernels for one pass where `input` is. Returns the first position whose target or value is invalid, or -1;
// on CUDA and in Triton an assertion of the device takes its place. Nothing is written then.
template <class Args>
int64_t run(const LossKernels<Args>& loss, Pass pass, const Args& args, const at::Tensor& input) {
  if (current_backend == Backend::triton) {
    const c10::DeviceGuard guard(input.device());
    launch_triton(loss.triton(triton_kernels()), args, pass, input);
    return -1;
  }
  if (runs_on_cuda(input)) {
    const c10::DeviceGuard guard(input.device());
    at::Tensor workspace;
    const auto allocate = [&](std::size_t bytes) {
      workspace = at::empty({static_cast<int64_t>(bytes)}, input.options().dtype(at::kByte));
      return workspace.mutable_data_ptr();
    };
    loss.cuda(cuda_kernels()).launch(args, pass, allocate, current_stream(input.device()));
    return -1;
  }
  return cpu::launch(loss.cpu(cpu_kernels()), args, pass, parallel_for);
}

// Where a kernel writes the reduced loss, and the divisor if it is defined. An unreduced loss is not a total's.
// denominator: one float64, if it is defined.
inline Total total_of(const at::Tensor& loss, const at::Tensor& divisor, Reduction reduction,
                      const at::Tensor& denominator = {}) {
  const bool reduced = reduction != Reduction::none;
  return {.reduction = reduction,
          .loss = reduced ? loss.data_ptr() : nullptr,
          .dtype = dtype_of(loss.scalar_type()),
          .divisor = divisor.defined() ? divisor.mutable_data_ptr<double>() : nullptr,
          .denominator = denominator.defined() ? denominator.const_data_ptr<double>() : nullptr};
}

// The gradient of a loss is divided by the mean's divisor.
inline const double* grad_divisor(const at::Tensor& divisor, Reduction reduction) {
  return reduction == Reduction::mean ? divisor.const_data_ptr<double>() : nullptr;
}

// The grad_output that forward assumes (csrc/ops/rescale.cpp): grad_scale, or the nearest number for which the gradient
// neither overflows nor vanishes. largest_gradient: a number that no entry of it exceeds, for a grad_output of 1; asked
// only where that matters.
Tensor chosen_scale(OptionalTensor grad_scale, const Tensor& grad, at::ScalarType loss_type,
                    c10::function_ref<Tensor()> largest_gradient);

}  // namespace fusedloss::ops
