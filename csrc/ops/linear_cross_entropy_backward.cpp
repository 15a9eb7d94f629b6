// The gradient of a linear layer's cross entropy from the statistics of its rows, for which the logits are made again.
//
// They are made in slices of the classes where that can be: a slice of the weight's gradient is written once, and what
// adds up is the input's gradient, which is small. A row whose target is in another slice has no target in this one,
// and its gradient there is what flows into its lse. Where every class has mass, slices would have to share it: there
// the logits are made in chunks of rows, and the weight's gradient adds up.

#include <ATen/TensorOperators.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "huge_pages.h"
#include "linear_cross_entropy.h"

namespace fusedloss::ops {
namespace {

struct Results {
  Tensor input, weight, target, bias;
};

// What flows back into each row, and its statistics.
CrossEntropyGradOutputs of_rows(const CrossEntropyGradOutputs& grads, Reduction reduction, const auto& choose) {
  const auto chosen = [&](const std::optional<Tensor>& tensor) {
    return is_present(tensor) ? std::optional<Tensor>(choose(*tensor)) : std::nullopt;
  };
  return {reduction == Reduction::none ? Tensor(choose(grads.loss)) : grads.loss,
          chosen(grads.lse),
          chosen(grads.entropy),
          choose(grads.row_max),
          choose(grads.row_log_sum),
          chosen(grads.row_gap),
          grads.divisor};
}

// What the slices of the classes have in common.
struct SlicedRows {
  CrossEntropyGradOutputs grads;  // .loss: into each position's target logit; .lse: into its lse, but for that
  Tensor target, counts;

  SlicedRows(const CrossEntropyGradOutputs& given, const Batch& batch, const CrossEntropyOptions& options)
      : grads(given), target(batch.target.to(at::kLong)), counts(target.ne(options.ignore_index.expect_int())) {
    const auto type = given.row_max.scalar_type();
    const Tensor zeros = at::zeros_like(given.row_max);
    Tensor each = given.loss.to(at::kDouble);
    if (options.reduction == Reduction::mean) each = each / given.divisor;
    if (is_present(batch.weights.sample_weight)) each = each * batch.weights.sample_weight->to(at::kDouble);
    each = at::where(counts, each.to(type).expand_as(zeros), zeros);
    Tensor lse = is_present(given.lse) ? given.lse->to(type) : zeros;
    if (options.z_loss != 0) {
      const Tensor z = each * (2 * options.z_loss) * (given.row_max + given.row_log_sum);
      lse = lse + at::where(counts, z, zeros);
    }
    if (is_present(batch.weights.weight)) {
      const Tensor weight = batch.weights.weight->flatten().to(type);
      const Tensor classes = at::where(counts, target, at::zeros_like(target)).flatten();
      each = each * weight.index_select(0, classes).view_as(each);
    }
    grads.loss = each;
    grads.lse = lse;
    // Ignored rows, where nothing flows back into them, may hold anything.
    if (!is_present(given.lse) && !is_present(given.entropy)) {
      grads.row_max = at::where(counts, grads.row_max, at::full_like(grads.row_max, 1e30));
      grads.row_log_sum = at::where(counts, grads.row_log_sum, zeros);
    }
  }

  // Writes the gradient over the logits of the classes from `first` on.
  void differentiate(Tensor& logits, int64_t first, const CrossEntropyOptions& options) const {
    constexpr int64_t kElsewhere = -100;
    const Tensor here = target - first;
    const Tensor inside = counts.logical_and(here.ge(0)).logical_and_(here.lt(logits.size(1)));
    CrossEntropyGradOutputs of_slice = grads;
    of_slice.lse = *grads.lse + at::where(inside, at::zeros_like(grads.loss), grads.loss);
    CrossEntropyOptions plain;
    plain.logit_scale = options.logit_scale;
    plain.logit_softcap = options.logit_softcap;
    plain.reduction = Reduction::none;
    plain.ignore_index = kElsewhere;
    Tensor none;
    write_cross_entropy_grads(of_slice, logits, at::where(inside, here, at::full_like(here, kElsewhere)), {}, plain,
                              logits, none);
  }
};

void by_classes(const CrossEntropyGradOutputs& grads, const Batch& batch, const Tensor& finite,
                const Tensor& linear_weight, OptionalTensor linear_bias, const CrossEntropyOptions& options,
                const LinearProblem<>& problem, Results& results) {
  const int64_t classes = linear_weight.size(0), positions = classes == 0 ? 0 : problem.logits / classes;
  const int64_t slice = linear_slice(problem, classes, positions);
  const SlicedRows rows(grads, batch, options);
  const Tensor memory = Logits::memory_for(batch.rows(), linear_weight.narrow(0, 0, std::min(slice, classes)));
  std::optional<ProductSum> grad_input;
  if (results.input.defined()) grad_input.emplace(batch.input.sizes(), batch.input.options());
  for (int64_t first = 0; first < classes; first += slice) {
    const int64_t count = std::min(slice, classes - first);
    const Tensor weight = linear_weight.narrow(0, first, count);
    std::optional<Tensor> bias;
    if (is_present(linear_bias)) bias = linear_bias->narrow(0, first, count);
    const Logits logits(weight, bias, memory);
    const Tensor matrix = logits.matrix(finite);
    Tensor shaped = logits.shaped(matrix);
    rows.differentiate(shaped, first, options);
    if (grad_input) grad_input->add(matrix, weight_matrix(weight));
    const auto of_slice = [&](const Tensor& result) { return result.narrow(0, first, count); };
    if (results.weight.defined()) product_into(weight_matrix(of_slice(results.weight)), matrix.t(), finite);
    if (results.bias.defined()) of_slice(results.bias).copy_(column_sums(matrix).view_as(*bias));
  }
  if (grad_input) results.input.copy_(grad_input->result());
}

void by_rows(const CrossEntropyGradOutputs& grads, const Batch& batch, const Tensor& finite,
             const Tensor& linear_weight, OptionalTensor linear_bias, const CrossEntropyOptions& options,
             const LinearProblem<>& problem, at::ScalarType loss_type, Results& results) {
  const bool whole = linear_plan(problem) == LinearPlan::one_chunk;
  const int64_t chunk = whole ? batch.rows() : linear_chunk(problem, problem.accumulator());
  const Logits logits(linear_weight, linear_bias, Logits::memory_for(std::min(chunk, batch.rows()), linear_weight));
  std::optional<LinearGrads> sums;
  if (!whole) {
    sums.emplace(batch.input, linear_weight,
                 std::array{results.input.defined(), results.weight.defined(), results.bias.defined()});
  }
  for_each_chunk(batch.rows(), chunk, [&](int64_t begin, int64_t count) {
    const auto of_chunk = [&](const Tensor& tensor) { return tensor.narrow(0, begin, count); };
    const Batch part = batch.chunk(begin, count);
    const Tensor matrix = logits.matrix(part.input);
    const Tensor shaped = logits.shaped(matrix), wide = widened(shaped, loss_type);
    Tensor grad_logits = wide, grad_target = results.target.defined() ? of_chunk(results.target) : Tensor();
    write_cross_entropy_grads(of_rows(grads, options.reduction, of_chunk), wide, part.target, part.weights, options,
                              grad_logits, grad_target);
    if (!wide.is_same(shaped)) shaped.copy_(wide);
    if (sums) return sums->add(matrix, of_chunk(finite), begin);
    if (results.input.defined()) product_into(results.input, matrix, weight_matrix(linear_weight));
    if (results.weight.defined()) product_into(weight_matrix(results.weight), matrix.t(), finite);
    if (results.bias.defined()) results.bias.copy_(column_sums(matrix).view_as(results.bias));
  });
  if (whole) return;
  if (results.input.defined()) results.input.copy_(sums->grad_input());
  if (results.weight.defined()) results.weight.copy_(sums->grad_weight().view(results.weight.sizes()));
  if (results.bias.defined()) results.bias.copy_(sums->grad_bias().view(results.bias.sizes()));
}

}  // namespace

LinearCrossEntropy::FourGrads LinearCrossEntropy::backward(
    const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy, const Tensor& input,
    const Tensor& linear_weight, const Tensor& target, OptionalTensor linear_bias, const Weights& weights,
    const Tensor& row_max, const Tensor& row_log_sum, OptionalTensor row_gap, const Tensor& divisor,
    const CrossEntropyOptions& options, at::ScalarType weight_type, std::array<bool, 4> output_mask,
    const LinearOptions& linear) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_linear(input, linear_weight, target, linear_bias);
  const Tensor shape = linear_logits(input, linear_weight);
  const CrossEntropyGradOutputs given{grad_loss, grad_lse, grad_entropy, row_max, row_log_sum, row_gap, divisor};
  check_cross_entropy_grads(kLinearName, given, shape, target, weights, options);
  TORCH_CHECK(!output_mask[2] || has_probabilities(shape, target), kLinearName,
              ": a target of class indices has no gradient");
  TORCH_CHECK(!output_mask[3] || is_present(linear_bias), kLinearName, ": there is no linear_bias to have a gradient");

  const auto of_weight = linear_weight.options().dtype(weight_type);
  const auto result = [&](bool wanted, const Tensor& like, const at::TensorOptions& type) {
    return wanted ? with_huge_pages(at::empty_symint(like.sym_sizes(), type)) : Tensor();
  };
  Results results{result(output_mask[0], input, input.options()), result(output_mask[1], linear_weight, of_weight),
                  result(output_mask[2], target, target.options()),
                  output_mask[3] ? result(true, *linear_bias, of_weight) : Tensor()};
  if (!input.is_meta()) {
    const bool every_row = is_present(grad_lse) || is_present(grad_entropy);
    const int64_t ignore_index = options.ignore_index.expect_int();
    const Tensor rows = every_row ? Tensor() : rows_to_compute(shape, target, ignore_index, linear.skip_ignored);
    const auto gathered = [&](const Tensor& tensor) { return rows.defined() ? tensor.index_select(0, rows) : tensor; };
    const Batch batch = Batch{input, target, weights}.gathered(rows);
    const CrossEntropyGradOutputs grads = of_rows(given, options.reduction, gathered);
    const Tensor finite = every_row ? batch.input : without_ignored(batch.input, shape, target, rows, ignore_index);
    const auto problem = linear_problem(batch.input, linear_weight, linear, true, output_mask[1]);
    if (rows.defined() && output_mask[0]) results.input = at::empty(batch.input.sizes(), input.options());
    if (has_probabilities(shape, target) || options.label_smoothing > 0) {
      by_rows(grads, batch, finite, linear_weight, linear_bias, options, problem,
              cross_entropy_loss_type(shape, target, weights.weight, /*upcast=*/true), results);
    } else {
      by_classes(grads, batch, finite, linear_weight, linear_bias, options, problem, results);
    }
    if (rows.defined() && output_mask[0]) results.input = scattered(results.input, rows, input.size(0));
  }
  return {or_empty(results.input, input.options()), or_empty(results.weight, of_weight),
          or_empty(results.target, target.options()), or_empty(results.bias, of_weight)};
}

}  // namespace fusedloss::ops
