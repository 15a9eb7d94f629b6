#include "cpu_reference.h"

#include <vector>

#include "kernels/cpu/cpu.h"

using namespace fusedloss;

namespace {

const cpu::Kernels& kernels() { return cpu::kernels(cpu::InstructionSet::baseline); }

double const*& divisor_of(ElementwiseArgs& args) { return args.flow.divisor; }
double const*& divisor_of(CrossEntropyArgs& args) { return args.flow.divisor; }
double const*& divisor_of(NllArgs& args) { return args.flow.divisor; }

template <class Args, cpu::Loss<Args> cpu::Kernels::* kLoss>
void run(const Args& args, Pass pass) {
  const cpu::Loss<Args>& loss = kernels().*kLoss;
  const std::int64_t blocks = cpu::block_count(args);
  if (pass == Pass::backward) return loss.backward(args, nullptr, 0, blocks);
  Args with = args;
  const auto forward = [&](cpu::Kernel<Args> kernel) {
    std::vector<cpu::Partial> partials(static_cast<std::size_t>(blocks));
    kernel(with, partials.data(), 0, blocks);
    return cpu::reduce(partials.data(), blocks);
  };
  double counted = 0;
  if (pass == Pass::forward_with_gradient && args.total.reduction == Reduction::mean) {
    counted = loss.count ? forward(loss.count).divisor : 0;
    divisor_of(with) = &counted;
  }
  cpu::finish(forward(loss.forward), args.total);
}

}  // namespace

const CpuReference* fusedloss_cpu_reference() {
  static const CpuReference reference{
      run<CrossEntropyArgs, &cpu::Kernels::cross_entropy>,
      run<NllArgs, &cpu::Kernels::nll>,
      run<ElementwiseArgs, &cpu::Kernels::bce_with_logits>,
      run<ElementwiseArgs, &cpu::Kernels::bce>,
  };
  return &reference;
}
