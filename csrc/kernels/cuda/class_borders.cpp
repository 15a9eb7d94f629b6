// Where the launches of a cross entropy change as its classes grow.

#include "plan.h"

namespace fusedloss::cuda {
namespace {

// An address that no plan reads from: only how it is aligned matters.
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

// What a plan makes of a number of classes, as numbers: equal where the same is launched in the same way, but for how
// much of it.
class Signatures {
 public:
  Signatures(const ClassProblem& problem, const Device& device, ResidentBlocks resident_blocks)
      : problem_(problem), device_(device), resident_blocks_(resident_blocks) {}

  std::vector<std::int64_t> operator()(std::int64_t classes) const {
    constexpr std::size_t kWithoutOptingIn = 48 * 1024;  // static and dynamic
    std::vector<std::int64_t> numbers;
    const CrossEntropyArgs args = arguments_of(problem_, classes);
    for (const Step& step : plan_cross_entropy(args, problem_.pass, device_, resident_blocks_).steps) {
      const Launch& shape = step.shape;
      numbers.insert(numbers.end(), {std::int64_t(step.plan.index()), std::int64_t(step.pass), step.variant,
                                     way_of(step), shape.threads, shape.cluster, shape.shared_bytes > kWithoutOptingIn,
                                     shape.shared_bytes + kStaticSharedBytes > kWithoutOptingIn});
    }
    return numbers;
  }

 private:
  // Which of its ways the kernel takes: lanes or slices of a row, what is kept.
  static std::int64_t way_of(const Step& step) {
    if (const auto* tiles = std::get_if<TilePlan>(&step.plan)) return 2 * tiles->lanes + tiles->skips;
    if (const auto* columns = std::get_if<ColumnPlan>(&step.plan)) return columns->keeps;
    const auto* rows = std::get_if<RowPlan>(&step.plan);
    if (!rows) return 0;
    // Of slices that meet through memory a warp adds up 32 at a time.
    return step.pass == Pass::forward_with_gradient ? rows->slices : (rows->slices > 1) + (rows->slices > kWarp);
  }

  const ClassProblem& problem_;
  const Device& device_;
  const ResidentBlocks resident_blocks_;
};

// Appends the borders in (few, many].
void find_borders(const Signatures& signature, std::int64_t few, const std::vector<std::int64_t>& at_few,
                  std::int64_t many, const std::vector<std::int64_t>& at_many, std::vector<std::int64_t>& borders) {
  if (at_few == at_many) return;
  if (many - few == 1) return borders.push_back(many);
  const std::int64_t middle = few + (many - few) / 2;
  const std::vector<std::int64_t> at_middle = signature(middle);
  find_borders(signature, few, at_few, middle, at_middle, borders);
  find_borders(signature, middle, at_middle, many, at_many, borders);
}

}  // namespace

std::vector<std::int64_t> class_borders(const ClassProblem& problem, std::int64_t most, const Device& device,
                                        ResidentBlocks resident_blocks) {
  const Signatures signature(problem, device, resident_blocks);
  std::vector<std::int64_t> borders;
  std::int64_t few = 1;
  std::vector<std::int64_t> at_few = signature(few);
  while (few < most) {
    // Every number at first, then steps of a hundredth: a way that is taken on less than that would be missed.
    const std::int64_t many = std::min(most, std::max(few + 1, few + few / 100));
    std::vector<std::int64_t> at_many = signature(many);
    find_borders(signature, few, at_few, many, at_many, borders);
    few = many;
    at_few = std::move(at_many);
  }
  return borders;
}

}  // namespace fusedloss::cuda
