// The gradient of a linear layer's cross entropy from the statistics of its rows, for which the logits are made again.
//
// They are made in slices of the classes where the target is class indices: a slice of the weight's gradient is written
// once, and what adds up is the input's gradient, which is small. The classes of a slice are some of many to the
// kernel, as those of a rank are, of which these may be slices themselves. Of probabilities slices would have to be cut
// too: there the logits are made in chunks of rows, and the weight's gradient adds up.

#include <ATen/TensorOperators.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "cross_entropy_shard.h"
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
          grads.divisor,
          chosen(grads.row_mass)};
}

// All masses of each row together, in the type of its statistics; of rows that do not count they are anything.
Tensor row_masses(const Batch& batch, const Tensor& row_max, const CrossEntropyOptions& options, int64_t classes) {
  math::RowOptions of_rows = options;
  if (!(of_rows.label_smoothing > 0)) of_rows.label_smoothing = 0;
  const auto problem = math::row_problem<double>(of_rows, /*probabilities=*/false, double(classes), double(classes));
  if (!is_present(batch.weights.weight)) return at::full_like(row_max, problem.keep + problem.spread_mass);
  const Tensor weight = batch.weights.weight->flatten().to(at::kDouble);
  const Tensor valid = batch.target.to(at::kLong).flatten().clamp(0, classes - 1);
  const Tensor masses = weight.index_select(0, valid) * problem.keep + weight.sum() * problem.spread;
  return masses.to(row_max.scalar_type()).view_as(row_max);
}

// shard: where the classes are those of a rank.
void by_classes(CrossEntropyGradOutputs grads, const Batch& batch, const Tensor& finite, const Tensor& linear_weight,
                OptionalTensor linear_bias, const CrossEntropyOptions& options, const LinearProblem<>& problem,
                const std::optional<ClassShard>& shard, Results& results) {
  const int64_t classes = linear_weight.size(0), positions = classes == 0 ? 0 : problem.logits / classes;
  const int64_t slice = linear_slice(problem, classes, positions);
  const ClassShard all = shard.value_or(ClassShard{0, classes});
  if (classes > 0 && !is_present(grads.row_mass)) {
    grads.row_mass = row_masses(batch, grads.row_max, options, classes);
  }
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
    CrossEntropyWeights weights = batch.weights;
    if (is_present(weights.weight)) weights.weight = weights.weight->flatten().narrow(0, first, count);
    Tensor none;
    write_cross_entropy_grads(grads, shaped, batch.target, weights, options, shaped, none,
                              ClassShard{all.first_class + first, all.num_classes});
    if (grad_input) grad_input->add(matrix, weight_matrix(weight));
    const auto of_slice = [&](const Tensor& result) { return result.narrow(0, first, count); };
    if (results.weight.defined()) product_into(weight_matrix(of_slice(results.weight)), matrix.t(), finite);
    if (results.bias.defined()) of_slice(results.bias).copy_(column_sums(matrix).view_as(*bias));
  }
  if (grad_input) results.input.copy_(grad_input->result());
}

void by_rows(const CrossEntropyGradOutputs& grads, const Batch& batch, const Tensor& finite,
             const Tensor& linear_weight, OptionalTensor linear_bias, const CrossEntropyOptions& options,
             const LinearProblem<>& problem, const std::optional<ClassShard>& shard, at::ScalarType loss_type,
             Results& results) {
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
                              grad_logits, grad_target, shard);
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

// weights: of a shard its own.
LinearCrossEntropy::FourGrads differentiate(const CrossEntropyGradOutputs& given, const Tensor& input,
                                            const Tensor& linear_weight, const Tensor& target,
                                            OptionalTensor linear_bias, const CrossEntropyWeights& weights,
                                            const CrossEntropyOptions& options, at::ScalarType input_type,
                                            at::ScalarType weight_type, std::array<bool, 4> output_mask,
                                            const LinearOptions& linear, const std::optional<ClassShard>& shard) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_linear(input, linear_weight, target, linear_bias);
  const Tensor shape = linear_logits(input, linear_weight);
  check_cross_entropy_grads(kLinearName, given, shape, target, weights, options);
  TORCH_CHECK(!output_mask[2] || has_probabilities(shape, target), kLinearName,
              ": a target of class indices has no gradient");
  TORCH_CHECK(!output_mask[3] || is_present(linear_bias), kLinearName, ": there is no linear_bias to have a gradient");

  const auto of_input = input.options().dtype(input_type);
  const auto of_weight = linear_weight.options().dtype(weight_type);
  const auto result = [&](bool wanted, const Tensor& like, const at::TensorOptions& type) {
    return wanted ? with_huge_pages(at::empty_symint(like.sym_sizes(), type)) : Tensor();
  };
  Results results{result(output_mask[0], input, of_input), result(output_mask[1], linear_weight, of_weight),
                  result(output_mask[2], target, target.options()),
                  output_mask[3] ? result(true, *linear_bias, of_weight) : Tensor()};
  if (!input.is_meta()) {
    const bool every_row = is_present(given.lse) || is_present(given.entropy);
    const int64_t ignore_index = options.ignore_index.expect_int();
    const Tensor rows = every_row ? Tensor() : rows_to_compute(shape, target, ignore_index, linear.skip_ignored);
    const auto gathered = [&](const Tensor& tensor) { return rows.defined() ? tensor.index_select(0, rows) : tensor; };
    const Batch batch = Batch{input, target, weights}.gathered(rows);
    const CrossEntropyGradOutputs grads = of_rows(given, options.reduction, gathered);
    const Tensor finite = every_row ? batch.input : without_ignored(batch.input, shape, target, rows, ignore_index);
    const auto problem = linear_problem(batch.input, linear_weight, linear, true, output_mask[1]);
    if (rows.defined() && output_mask[0]) results.input = at::empty(batch.input.sizes(), of_input);
    if (has_probabilities(shape, target)) {
      by_rows(grads, batch, finite, linear_weight, linear_bias, options, problem, shard,
              cross_entropy_loss_type(shape, target, weights.weight, /*upcast=*/true), results);
    } else {
      by_classes(grads, batch, finite, linear_weight, linear_bias, options, problem, shard, results);
    }
    if (rows.defined() && output_mask[0]) results.input = scattered(results.input, rows, input.size(0));
  }
  return {or_empty(results.input, of_input), or_empty(results.weight, of_weight),
          or_empty(results.target, target.options()), or_empty(results.bias, of_weight)};
}

}  // namespace

LinearCrossEntropy::FourGrads LinearCrossEntropy::backward(
    const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy, const Tensor& input,
    const Tensor& linear_weight, const Tensor& target, OptionalTensor linear_bias, const Weights& weights,
    const Tensor& row_max, const Tensor& row_log_sum, OptionalTensor row_gap, const Tensor& divisor,
    const CrossEntropyOptions& options, at::ScalarType weight_type, std::array<bool, 4> output_mask,
    const LinearOptions& linear) {
  return differentiate({grad_loss, grad_lse, grad_entropy, row_max, row_log_sum, row_gap, divisor, {}}, input,
                       linear_weight, target, linear_bias, weights, options, input.scalar_type(), weight_type,
                       output_mask, linear, {});
}

LinearCrossEntropy::FourGrads LinearCrossEntropyShard::backward(
    const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy, const Tensor& input,
    const Tensor& linear_weight, const Tensor& target, OptionalTensor linear_bias, const Weights& weights,
    const MergedRows& rows, const CrossEntropyOptions& options, const ClassShard& shard, at::ScalarType weight_type,
    std::array<bool, 4> output_mask, const LinearOptions& linear) {
  check_merged(kLinearName, rows);
  const CrossEntropyWeights of_shard{
      weight_of_shard(kLinearName, weights.weight, linear_weight.sym_size(0), shard), weights.sample_weight, {}};
  return differentiate(grads_of(grad_loss, grad_lse, grad_entropy, rows), input, linear_weight, target, linear_bias,
                       of_shard, options, accumulate_type(input.scalar_type()), weight_type, output_mask, linear,
                       shard);
}

}  // namespace fusedloss::ops
