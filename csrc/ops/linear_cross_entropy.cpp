// A linear layer and the cross entropy of its logits. The logits are made in chunks of rows by ATen's matrix products,
// and our kernels turn each chunk into its loss and, in place, into its gradient; linear_plan.h says how many chunks,
// and which gradients are made when. There is no kernel of its own here, and no formula but that of a linear layer.
//
// Rows without a target that counts have no loss and no gradient. They are gathered away before the products where that
// is allowed (LinearOptions::skip_ignored) and nothing else is asked of them.

#include "linear_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>

#include <limits>
#include <vector>

#include "cross_entropy_shard.h"
#include "dispatch.h"

namespace fusedloss::ops {
namespace {

// The parts of a reduced loss are divided by what the whole is, and added up in float64.
struct Parts {
  CrossEntropyOptions options;
  Tensor divisor;               // of a mean
  bool may_be_nothing = false;  // then a mean is 0 / 0
  Tensor total;

  Parts(const Tensor& logits, const Batch& batch, const CrossEntropyOptions& options) : options(options) {
    if (options.reduction != Reduction::mean) return;
    divisor = mean_divisor(logits, batch.target, batch.weights, options);
    may_be_nothing = !is_present(batch.weights.denominator);
  }

  CrossEntropyWeights weights_of(const Batch& chunk) const {
    CrossEntropyWeights weights = chunk.weights;
    if (divisor.defined()) weights.denominator = divisor;
    return weights;
  }
  void add(const Tensor& part) {
    const Tensor wide = part.to(at::kDouble);
    total = total.defined() ? total.add_(wide) : wide.clone();
  }
  Tensor loss(at::ScalarType type) const {
    if (!divisor.defined() || !may_be_nothing) return total.to(type);
    const Tensor nothing = total.eq(0).logical_and_(divisor.eq(0));
    return total.masked_fill(nothing, std::numeric_limits<double>::quiet_NaN()).to(type);
  }
};

// Cross entropy sees a chunk, of the rows that are left: of a target that is no class the position is looked for again.
template <class Call>
auto naming_positions(int64_t classes, const Tensor& target, int64_t ignore_index, Call call) {
  try {
    return call();
  } catch (const c10::IndexError&) {
    check_targets(kLinearName, classes, target, ignore_index);
    throw;
  }
}

}  // namespace

CrossEntropy::Outputs LinearCrossEntropy::autocast(const Tensor& input, const Tensor& linear_weight,
                                                   const Tensor& target, OptionalTensor linear_bias,
                                                   const Weights& weights, const CrossEntropyOptions& options,
                                                   const CrossEntropyAnswers& answers, const LinearOptions& linear) {
  LinearOptions under = linear;
  under.upcast = true;
  under.product_type = at::autocast::get_autocast_dtype(input.device().type());
  const Tensor operand = cast_to(input, under.product_type);
  NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  return Operator<&LinearCrossEntropy::forward>::call(operand, linear_weight, target, linear_bias, weights, options,
                                                      answers, under);
}

CrossEntropy::Outputs LinearCrossEntropy::forward(const Tensor& given_input, const Tensor& given_weight,
                                                  const Tensor& target, OptionalTensor given_bias,
                                                  const Weights& weights, const CrossEntropyOptions& options,
                                                  const CrossEntropyAnswers& answers, const LinearOptions& linear) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const Tensor input = cast_to(given_input, linear.product_type);
  const Tensor linear_weight = cast_to(given_weight, linear.product_type);
  const auto linear_bias = cast_to(given_bias, linear.product_type);
  check_linear(input, linear_weight, target, linear_bias);
  const Tensor shape = linear_logits(input, linear_weight);
  check_cross_entropy(kLinearName, shape, target, weights, options, linear.upcast);
  TrainingOptions training{.upcast = linear.upcast, .statistics = linear.statistics};
  if (input.is_meta()) return CrossEntropy::forward(shape, target, weights, options, answers, training);

  const int64_t ignore_index = options.ignore_index.expect_int();
  const Batch all{input, target, weights};
  const Tensor rows = answers.any() ? Tensor() : rows_to_compute(shape, target, ignore_index, linear.skip_ignored);
  const Batch batch = all.gathered(rows);
  const auto problem = linear_problem(batch.input, linear_weight, linear, false, false);
  const int64_t chunk = linear_chunk(problem, /*taken=*/0);
  const Logits logits(linear_weight, linear_bias, Logits::memory_for(std::min(chunk, batch.rows()), linear_weight));
  const bool reduced = options.reduction != Reduction::none;
  // Where rows are left out, nothing but the loss and these two has an element for each of them.
  const auto back = [&](Outputs outputs) {
    auto& [loss, lse, entropy, argmax, row_max, row_log_sum, row_gap, divisor] = outputs;
    for (Tensor* each : {reduced ? nullptr : &loss, &row_max, &row_log_sum}) {
      if (each && each->defined()) *each = scattered(*each, rows, all.rows());
    }
    return outputs;
  };
  const auto loss_of = [&](const Batch& part, const CrossEntropyWeights& of_part) {
    return naming_positions(shape.size(1), target, ignore_index, [&] {
      return CrossEntropy::forward(logits.shaped(logits.matrix(part.input)), part.target, of_part, options, answers,
                                   training);
    });
  };
  if (batch.rows() <= chunk) {
    return back(loss_of(batch, batch.weights));
  }

  Parts parts(linear_logits(batch.input, linear_weight), batch, options);
  std::array<std::vector<Tensor>, std::tuple_size_v<Outputs>> found;
  training.upcast = linear.upcast || reduced;
  for_each_chunk(batch.rows(), chunk, [&](int64_t begin, int64_t count) {
    const Batch part = batch.chunk(begin, count);
    const auto outputs = loss_of(part, parts.weights_of(part));
    if (reduced) parts.add(std::get<0>(outputs));
    std::size_t i = 0;
    std::apply([&](const auto&... output) { (found[i++].push_back(output), ...); }, outputs);
  });
  Outputs outputs;
  std::size_t i = 0;
  std::apply(
      [&](auto&... output) {
        const auto joined = [&](const std::vector<Tensor>& each) {
          return each[0].defined() && each[0].dim() > 0 ? at::cat(each) : each[0];
        };
        ((output = joined(found[i++])), ...);
      },
      outputs);
  if (reduced) {
    std::get<0>(outputs) = parts.loss(cross_entropy_loss_type(shape, target, weights.weight, linear.upcast));
    Tensor& divisor = std::get<7>(outputs);
    // Not the denominator itself, which is an argument.
    if (divisor.defined() && parts.divisor.defined()) divisor = parts.divisor.clone();
  }
  return back(outputs);
}

Tensor LinearCrossEntropyShard::statistics(const Tensor& given_input, const Tensor& given_weight, const Tensor& target,
                                           OptionalTensor given_bias, const Weights& weights,
                                           const CrossEntropyOptions& options, const ClassShard& shard,
                                           const CrossEntropyAnswers& answers, const LinearOptions& linear) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  const Tensor input = cast_to(given_input, linear.product_type);
  const Tensor linear_weight = cast_to(given_weight, linear.product_type);
  const auto linear_bias = cast_to(given_bias, linear.product_type);
  check_linear(input, linear_weight, target, linear_bias);
  const Tensor shape = linear_logits(input, linear_weight);
  const auto of = [&](const Tensor& logits, const Batch& batch) {
    return CrossEntropyFromShards::statistics(logits, batch.target, batch.weights, options, shard, answers,
                                              linear.upcast);
  };
  CrossEntropyWeights of_shard = weights;
  of_shard.weight = weight_of_shard(kLinearName, weights.weight, linear_weight.sym_size(0), shard);
  check_cross_entropy(kLinearName, shape, target, of_shard, options, linear.upcast);
  const Batch all{input, target, weights};
  if (input.is_meta() || linear_weight.size(0) == 0) return of(shape, all);

  const int64_t ignore_index = options.ignore_index.expect_int();
  const Tensor rows = answers.any() ? Tensor() : rows_to_compute(shape, target, ignore_index, linear.skip_ignored);
  const Batch batch = all.gathered(rows);
  const int64_t chunk = linear_chunk(linear_problem(batch.input, linear_weight, linear, false, false), /*taken=*/0);
  const Logits logits(linear_weight, linear_bias, Logits::memory_for(std::min(chunk, batch.rows()), linear_weight));
  std::vector<Tensor> found;
  for_each_chunk(batch.rows(), chunk, [&](int64_t begin, int64_t count) {
    const Batch part = batch.chunk(begin, count);
    found.push_back(naming_positions(shard.num_classes.expect_int(), target, ignore_index,
                                     [&] { return of(logits.shaped(logits.matrix(part.input)), part); }));
  });
  const Tensor packed = found.size() == 1 ? found[0] : at::cat(found, 1);
  return rows.defined() ? scattered(packed.transpose(0, 1), rows, input.size(0)).transpose(0, 1).contiguous() : packed;
}

LinearCrossEntropy::WithGrad LinearCrossEntropy::with_grad(const Tensor& input, const Tensor& linear_weight,
                                                           const Tensor& target, OptionalTensor linear_bias,
                                                           const Weights& weights, const CrossEntropyOptions& options,
                                                           bool return_argmax, bool one_chunk,
                                                           std::array<bool, 3> output_mask,
                                                           const LinearOptions& linear) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  check_linear(input, linear_weight, target, linear_bias);
  const Tensor shape = linear_logits(input, linear_weight);
  check_cross_entropy(kLinearName, shape, target, weights, options, linear.upcast);
  TORCH_CHECK_VALUE(options.reduction != Reduction::none, kLinearName,
                    ": an unreduced loss has no gradient in forward");
  TORCH_CHECK(!output_mask[2] || is_present(linear_bias), kLinearName, ": there is no linear_bias to have a gradient");
  TORCH_CHECK(one_chunk || input.scalar_type() != at::kHalf, kLinearName,
              ": gradients of float16 logits are not added up, since each chunk has a scale of its own");

  const auto type = cross_entropy_loss_type(shape, target, weights.weight, linear.upcast);
  const auto indices = input.options().dtype(at::kLong), numbers = input.options().dtype(at::kDouble);
  const auto sums = input.options().dtype(accumulate_type(input.scalar_type()));
  Tensor loss, grad_logits, rows, grad_input, grad_weight, grad_bias;
  Tensor argmax = return_argmax ? at::empty_symint(position_sizes(shape), indices) : at::empty({0}, indices);
  std::optional<Tensor> scale;
  if (input.scalar_type() == at::kHalf) scale = at::empty({}, numbers);

  if (input.is_meta()) {
    loss = at::empty({}, input.options().dtype(type));
    if (one_chunk) {
      grad_logits = at::empty_symint(shape.sym_sizes(), input.options());
    } else {
      if (output_mask[0]) grad_input = at::empty_symint(input.sym_sizes(), sums);
      if (output_mask[1]) grad_weight = at::empty_symint(linear_weight.sym_sizes(), sums);
      if (output_mask[2]) grad_bias = at::empty_symint(linear_bias->sym_sizes(), sums);
    }
  } else {
    const int64_t ignore_index = options.ignore_index.expect_int();
    if (!return_argmax) rows = rows_to_compute(shape, target, ignore_index, linear.skip_ignored);
    const Batch batch = Batch{input, target, weights}.gathered(rows);
    const Tensor computed = linear_logits(batch.input, linear_weight);
    const auto problem = linear_problem(batch.input, linear_weight, linear, true, output_mask[1]);
    const int64_t chunk = one_chunk ? batch.rows() : linear_chunk(problem, problem.accumulator());
    const Logits logits(linear_weight, linear_bias, Logits::memory_for(std::min(chunk, batch.rows()), linear_weight));
    // Replaces the logits of some rows by their gradient.
    const auto differentiate = [&](const Batch& part, const Tensor& matrix, const CrossEntropyWeights& of_part,
                                   bool upcast, int64_t begin) {
      Tensor shaped = logits.shaped(matrix);
      const auto places = return_argmax ? std::optional(argmax.narrow(0, begin, part.rows())) : std::nullopt;
      return naming_positions(shape.size(1), target, ignore_index, [&] {
        return CrossEntropy::with_grad(shaped, part.target, of_part, std::nullopt, options, upcast, shaped, scale,
                                       places);
      });
    };
    if (one_chunk) {
      const Tensor matrix = logits.matrix(batch.input);
      loss = differentiate(batch, matrix, batch.weights, linear.upcast, 0);
      grad_logits = logits.shaped(matrix);
    } else {
      Parts parts(computed, batch, options);
      LinearGrads grads(batch.input, linear_weight, output_mask);
      const Tensor finite =
          output_mask[1] ? without_ignored(batch.input, computed, batch.target, rows, ignore_index) : batch.input;
      for_each_chunk(batch.rows(), chunk, [&](int64_t begin, int64_t count) {
        const Batch part = batch.chunk(begin, count);
        const Tensor matrix = logits.matrix(part.input);
        parts.add(differentiate(part, matrix, parts.weights_of(part), /*upcast=*/true, begin));
        grads.add(matrix, finite.narrow(0, begin, count), begin);
      });
      loss = parts.loss(type);
      if (output_mask[0]) grad_input = scattered(grads.grad_input(), rows, input.size(0));
      if (output_mask[1]) grad_weight = grads.grad_weight().view(linear_weight.sizes());
      if (output_mask[2]) grad_bias = grads.grad_bias().view(linear_bias->sizes());
    }
  }
  return {loss,
          argmax,
          or_empty(grad_logits, input.options()),
          or_empty(rows, indices),
          scale.value_or(at::empty({0}, numbers)),
          or_empty(grad_input, sums),
          or_empty(grad_weight, sums),
          or_empty(grad_bias, sums)};
}

LinearCrossEntropy::ThreeGrads LinearCrossEntropy::gradients(
    const Tensor& grad_output, const Tensor& grad_logits, const Tensor& given_rows, OptionalTensor scale,
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, c10::SymInt ignore_index,
    at::ScalarType weight_type, std::array<bool, 3> output_mask, std::optional<at::ScalarType> input_type) {
  const NoAutocast no_autocast(c10::autocast_dispatch_keyset);
  TORCH_CHECK(grad_output.sym_numel() == 1, kLinearName, ": grad_output must be one number, got shape ",
              grad_output.sym_sizes());
  const auto of_input = input.options().dtype(input_type.value_or(input.scalar_type()));
  const auto of_weight = linear_weight.options().dtype(weight_type);
  Tensor grad_input, grad_weight, grad_bias;
  const auto bias_sizes = linear_weight.sym_sizes().slice(0, linear_weight.dim() - 1);
  if (input.is_meta()) {
    if (output_mask[0]) grad_input = at::empty_symint(input.sym_sizes(), of_input);
    if (output_mask[1]) grad_weight = at::empty_symint(linear_weight.sym_sizes(), of_weight);
    if (output_mask[2]) grad_bias = at::empty_symint(bias_sizes, of_weight);
  } else {
    // Without rows that were left out the list is empty; so it is without any row that counts, and nothing else then.
    const bool gathered = grad_logits.size(0) != input.size(0);
    const Tensor rows = gathered ? given_rows : Tensor();
    const Tensor weight = weight_matrix(linear_weight);
    const Tensor matrix = grad_logits.reshape({grad_logits.size(0), weight.size(0)});
    const Factor factor(grad_output, scale);
    if (output_mask[0]) {
      const Tensor of_rows = product(matrix, weight, factor, c10::typeMetaToScalarType(of_input.dtype()));
      grad_input = scattered(of_rows, rows, input.size(0));
      // What is 0 stays so, whatever its factor.
      if (!factor.is_known_finite()) {
        grad_input =
            without_ignored(grad_input, linear_logits(input, linear_weight), target, rows, ignore_index.expect_int());
      }
    }
    if (output_mask[1]) {
      Tensor of_rows = gathered ? input.index_select(0, rows)
                                : without_ignored(input, linear_logits(input, linear_weight), target, rows,
                                                  ignore_index.expect_int());
      // On a device the factor is multiplied into the input, the small operand; but float16 has no room for it.
      const bool folds = factor.on_device() && input.scalar_type() != at::kHalf;
      if (folds) of_rows = factor.times(of_rows);
      grad_weight = product(matrix.t(), of_rows, folds ? Factor() : factor, weight_type).view(linear_weight.sizes());
    }
    if (output_mask[2]) {
      grad_bias = factor.times(column_sums(matrix))
                      .to(weight_type)
                      .view(linear_weight.sizes().slice(0, linear_weight.dim() - 1));
    }
  }
  return {or_empty(grad_input, of_input), or_empty(grad_weight, of_weight), or_empty(grad_bias, of_weight)};
}

}  // namespace fusedloss::ops
