// From a filled argument struct to a running kernel.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include "../kernels/cpu/cpu.h"
#include "checks.h"
#include "losses.h"

namespace fusedloss::ops {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    case at::kBool:
    case at::kByte: return Dtype::uint8;
    case at::kChar: return Dtype::int8;
    case at::kShort: return Dtype::int16;
    case at::kInt: return Dtype::int32;
    case at::kLong: return Dtype::int64;
    default: TORCH_INTERNAL_ASSERT(false, "no kernel reads ", type);
  }
}

// The type that sums, row statistics and class weights have.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline at::ScalarType upcast_type(at::ScalarType type, bool upcast) {
  return upcast && (type == at::kBFloat16 || type == at::kHalf) ? at::kFloat : type;
}

// Follows ATEN_CPU_CAPABILITY, as native kernels do.
inline const cpu::Kernels& cpu_kernels() {
  static const cpu::Kernels& chosen = [&]() -> const cpu::Kernels& {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return cpu::kernels(cpu::InstructionSet::avx512);
    if (capability == "AVX2") return cpu::kernels(cpu::InstructionSet::avx2);
    return cpu::kernels(cpu::InstructionSet::baseline);
  }();
  return chosen;
}

template <class Args>
void run_blocks(cpu::Kernel<Args> kernel, const Args& args, int64_t blocks) {
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Args>
Partial run_forward(cpu::Kernel<Args> kernel, Args args) {
  const int64_t blocks = cpu::block_count(args);
  c10::SmallVector<Partial, 16> partials(blocks);
  args.partials = partials.data();
  run_blocks(kernel, args, blocks);
  return reduce(partials.data(), blocks);
}

template <class Args>
void run_backward(cpu::Kernel<Args> kernel, const Args& args) {
  run_blocks(kernel, args, cpu::block_count(args));
}

// Writes the reduced loss.
inline void finish_reduction(const Partial& total, int64_t reduction, at::Tensor& loss) {
  if (reduction == int64_t(Reduction::none)) return;
  const double value = reduction == int64_t(Reduction::mean) ? total.loss / total.divisor : total.loss;
  switch (loss.scalar_type()) {
    case at::kDouble: *loss.mutable_data_ptr<double>() = value; break;
    case at::kFloat: *loss.mutable_data_ptr<float>() = static_cast<float>(value); break;
    case at::kBFloat16: *loss.mutable_data_ptr<at::BFloat16>() = static_cast<float>(value); break;
    case at::kHalf: *loss.mutable_data_ptr<at::Half>() = static_cast<float>(value); break;
    default: TORCH_INTERNAL_ASSERT(false, "a loss is never ", loss.scalar_type());
  }
}

inline double grad_scale(double divisor, int64_t reduction) {
  return reduction == int64_t(Reduction::mean) ? 1 / divisor : 1.0;
}

inline double grad_scale(const at::Tensor& divisor, int64_t reduction) {
  return grad_scale(*divisor.const_data_ptr<double>(), reduction);
}

// The number in a tensor of one element.
inline double number_in(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return *tensor.const_data_ptr<double>();
    case at::kFloat: return *tensor.const_data_ptr<float>();
    case at::kBFloat16: return *tensor.const_data_ptr<at::BFloat16>();
    case at::kHalf: return *tensor.const_data_ptr<at::Half>();
    default: TORCH_CHECK(false, "expected a floating-point number, got ", tensor.scalar_type());
  }
}

// The grad_output that forward assumes, rounded as backward will see it: in the loss's type.
inline double assumed_grad_output(OptionalTensor grad_scale, at::ScalarType loss_type) {
  return is_present(grad_scale) ? number_in(grad_scale->to(loss_type)) : 1.0;
}

}  // namespace fusedloss::ops
