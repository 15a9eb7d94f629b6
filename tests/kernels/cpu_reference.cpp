#include "cpu_reference.h"

using namespace fusedloss;

namespace {

void in_one_thread(std::int64_t count, const cpu::Work& work) { work(0, count); }

template <class Args>
void run(const cpu::Loss<Args>& loss, const Args& args, Pass pass) {
  cpu::launch(loss, args, pass, in_one_thread);
}

}  // namespace

const CpuReference* fusedloss_cpu_reference() {
  static const CpuReference reference =
      cpu::kernels(cpu::InstructionSet::baseline)
          .map<ReferenceLoss>([]<class Args>(const char*, const cpu::Loss<Args>& loss) {
            return ReferenceLoss<Args>{&loss, run<Args>};
          });
  return &reference;
}
