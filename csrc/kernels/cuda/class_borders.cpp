// Where the launches of a cross entropy change as its classes grow.

#include "plan.h"

namespace fusedloss::cuda {
namespace {

// An address that no plan reads from: only how it is aligned matters.
void* somewhere() { return reinterpret_cast<void*>(std::uintptr_t(1) << 20); }

// What a plan depends on.
CrossEntropyArgs arguments_of(const ClassProblem& problem, std::int64_t classes) {
  CrossEntropyArgs args;
  args.shape = {1, classes, problem.positions};
  args.logits = problem.columns ? ClassTensor{somewhere(), problem.dtype, 0, problem.positions, 1}
                                : ClassTensor{somewhere(), problem.dtype, 0, 1, classes};
  args.label_smoothing = problem.general ? 0.1 : 0;
  if (problem.pass != Pass::backward) args.total = {Reduction::mean, somewhere(), problem.dtype};
  if (problem.pass != Pass::forward) args.grad_logits = args.logits;
  return args;
}

// Which of its ways a kernel takes: lanes or slices of a row, what is kept.
std::int64_t way_of(const Step& step) {
  if (const auto* tiles = std::get_if<TilePlan>(&step.plan)) return tiles->lanes;
  if (const auto* warps = std::get_if<WarpPlan>(&step.plan)) return warps->lanes;
  if (const auto* columns = std::get_if<ColumnPlan>(&step.plan)) return columns->keeps;
  const auto* rows = std::get_if<RowPlan>(&step.plan);
  if (!rows || step.shape.cluster > 1) return 0;
  // A warp adds up 32 slices at a time, where they meet through memory.
  return (rows->slices > 1) + (rows->slices > kWarp);
}

// Equal where the same is launched in the same way, but for how much of it.
std::vector<std::int64_t> signature_of(const CrossEntropyPlan& plan) {
  constexpr std::size_t kWithoutOptingIn = 48 * 1024;  // static and dynamic
  std::vector<std::int64_t> numbers;
  for (const Step& step : plan.steps) {
    const Launch& shape = step.shape;
    numbers.insert(numbers.end(), {std::int64_t(step.plan.index()), std::int64_t(step.pass), step.variant, way_of(step),
                                   shape.threads, shape.cluster, shape.shared_bytes > kWithoutOptingIn,
                                   shape.shared_bytes + kStaticSharedBytes > kWithoutOptingIn});
  }
  return numbers;
}

}  // namespace

std::vector<std::int64_t> class_borders(const ClassProblem& problem, std::int64_t most, const Device& device,
                                        ResidentBlocks resident_blocks) {
  const auto signature = [&](std::int64_t classes) {
    return signature_of(plan_cross_entropy(arguments_of(problem, classes), problem.pass, device, resident_blocks));
  };
  std::vector<std::int64_t> borders;
  // Appends those in (few, many].
  const auto find = [&](auto& self, std::int64_t few, const auto& at_few, std::int64_t many, const auto& at_many) {
    if (at_few == at_many) return;
    if (many - few == 1) return borders.push_back(many);
    const std::int64_t middle = few + (many - few) / 2;
    const auto at_middle = signature(middle);
    self(self, few, at_few, middle, at_middle);
    self(self, middle, at_middle, many, at_many);
  };
  // Every number at first, then steps of a hundredth: a way that is taken on less than that would be missed.
  for (std::int64_t few = 1, many; few < most; few = many) {
    many = std::min(most, std::max(few + 1, few + few / 100));
    find(find, few, signature(few), many, signature(many));
  }
  return borders;
}

}  // namespace fusedloss::cuda
