// Where the launches of a cross entropy change as its classes grow.

#include "cuda.h"
#include "device.h"

namespace fusedloss::cuda {
namespace {

// Addresses that no plan reads from: only how they are aligned matters.
void* somewhere() { return reinterpret_cast<void*>(std::uintptr_t(1) << 20); }

CrossEntropyArgs arguments_of(const ClassProblem& problem, std::int64_t classes) {
  CrossEntropyArgs args;
  args.shape = {1, classes, problem.positions};
  args.logits = problem.columns ? ClassTensor{somewhere(), problem.dtype, 0, problem.positions, 1}
                                : ClassTensor{somewhere(), problem.dtype, 0, 1, classes};
  args.target = {{somewhere(), Dtype::int64, 1}, -100};
  args.label_smoothing = problem.general ? 0.1 : 0;
  if (problem.pass != Pass::backward) {
    args.total = {Reduction::mean, somewhere(), problem.dtype, static_cast<double*>(somewhere())};
  }
  if (problem.pass != Pass::forward) args.grad_logits = args.logits;
  if (problem.pass != Pass::forward_with_gradient) args.row_max = args.row_log_sum = somewhere();
  return args;
}

// Equal where the same is launched in the same way, but for how much of it.
std::vector<std::int64_t> signature(const ClassProblem& problem, std::int64_t classes) {
  constexpr std::size_t kWithoutOptingIn = 48 * 1024;  // static and dynamic
  std::vector<std::int64_t> numbers;
  for (const PlannedLaunch& planned : kKernels.cross_entropy.plan(arguments_of(problem, classes), problem.pass)) {
    const Launch& shape = planned.shape;
    numbers.insert(numbers.end(), {std::int64_t(reinterpret_cast<std::uintptr_t>(planned.kernel)), planned.way,
                                   shape.threads, shape.cluster, shape.shared_bytes > kWithoutOptingIn,
                                   shape.shared_bytes + kStaticSharedBytes > kWithoutOptingIn});
  }
  return numbers;
}

// Appends the borders in (few, many].
void find_borders(const ClassProblem& problem, std::int64_t few, const std::vector<std::int64_t>& at_few,
                  std::int64_t many, const std::vector<std::int64_t>& at_many, std::vector<std::int64_t>& borders) {
  if (at_few == at_many) return;
  if (many - few == 1) return borders.push_back(many);
  const std::int64_t middle = few + (many - few) / 2;
  const std::vector<std::int64_t> at_middle = signature(problem, middle);
  find_borders(problem, few, at_few, middle, at_middle, borders);
  find_borders(problem, middle, at_middle, many, at_many, borders);
}

}  // namespace

std::vector<std::int64_t> class_borders(const ClassProblem& problem, std::int64_t most) {
  std::vector<std::int64_t> borders;
  std::int64_t few = 1;
  std::vector<std::int64_t> at_few = signature(problem, few);
  while (few < most) {
    // Every number at first, then steps of a hundredth: a way that is taken on less than that would be missed.
    const std::int64_t many = std::min(most, std::max(few + 1, few + few / 100));
    std::vector<std::int64_t> at_many = signature(problem, many);
    find_borders(problem, few, at_few, many, at_many, borders);
    few = many;
    at_few = std::move(at_many);
  }
  return borders;
}

}  // namespace fusedloss::cuda
