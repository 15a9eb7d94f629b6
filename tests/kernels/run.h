// One pass of a loss, on the CPU and, twice, on the device.

#pragma once

#include <vector>

#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"
#include "tensor.h"

namespace check {

inline const char* name_of(fusedloss::Pass pass) {
  constexpr const char* kNames[] = {"forward", "forward with gradient", "backward"};
  return kNames[static_cast<int>(pass)];
}

// The baseline kernels alone: the others are compared with them elsewhere.
template <class Args>
void run_cpu(fusedloss::cpu::Loss<Args> fusedloss::cpu::Kernels::* loss, fusedloss::Pass pass, Args args,
             const std::vector<Tensor*>& tensors, int fill = 0xff) {
  namespace cpu = fusedloss::cpu;
  const auto& kernels = cpu::kernels(cpu::InstructionSet::baseline).*loss;
  for (Tensor* tensor : tensors) tensor->prepare_cpu(fill);
  const std::int64_t blocks = cpu::block_count(args);
  const auto run = [&](cpu::Kernel<Args> kernel) {
    std::vector<cpu::Partial> partials(blocks);
    kernel(args, partials.data(), 0, blocks);
    return cpu::reduce(partials.data(), blocks);
  };
  if (pass == fusedloss::Pass::backward) {
    kernels.backward(args, nullptr, 0, blocks);
    return;
  }
  double divisor = 0;
  if (pass == fusedloss::Pass::forward_with_gradient && args.total.reduction == fusedloss::Reduction::mean) {
    divisor = run(kernels.count).divisor;
    args.flow.divisor = &divisor;
  }
  const cpu::Partial total = run(kernels.forward);
  EXPECT(total.invalid < 0, "the CPU refuses target %ld of a valid test", long(total.invalid));
  cpu::finish(total, args.total);
}

template <class Args>
void run_device(const fusedloss::cuda::Loss<Args>& loss, fusedloss::Pass pass, const Args& args,
                const std::vector<Tensor*>& tensors) {
  for (int run = 0; run < 2; ++run) {
    for (Tensor* tensor : tensors) tensor->prepare_device(run);
    const std::size_t bytes = loss.workspace_bytes(args, pass);
    DeviceMemory workspace(bytes);
    workspace.fill(0xff);
    loss.launch(args, pass, workspace.data(), nullptr);
    cuda_check(cudaDeviceSynchronize(), name_of(pass));
    for (Tensor* tensor : tensors) tensor->collect(run, name_of(pass));
  }
}

}  // namespace check
