// What forward and backward of a linear layer's cross entropy share: the shapes of the logits, the rows that are
// computed, the chunks that the logits are made in, and the gradients that chunks add to.

#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "class_views.h"
#include "cross_entropy.h"
#include "linear_plan.h"
#include "products.h"

namespace fusedloss::ops {

inline constexpr const char* kLinearName = "linear_cross_entropy";

using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;  // the products are of the operands as they are

// --- Types and shapes ---

inline Tensor cast_to(const Tensor& tensor, const std::optional<at::ScalarType>& type) {
  const bool casts = type && at::isFloatingType(tensor.scalar_type()) && tensor.scalar_type() != at::kDouble;
  return casts ? tensor.to(*type) : tensor;
}
inline std::optional<Tensor> cast_to(OptionalTensor tensor, const std::optional<at::ScalarType>& type) {
  return is_present(tensor) ? std::optional(cast_to(*tensor, type)) : std::nullopt;
}

// The type that the products' operands have.
inline at::ScalarType product_type(const Tensor& input, const LinearOptions& linear) {
  return input.scalar_type() == at::kDouble ? at::kDouble : linear.product_type.value_or(input.scalar_type());
}

// The shape of the logits of some rows.
inline c10::SymDimVector logit_sizes(const c10::SymInt& rows, const Tensor& linear_weight) {
  c10::SymDimVector sizes{rows};
  const auto of_weight = linear_weight.sym_sizes();
  sizes.append(of_weight.begin(), of_weight.end() - 1);
  return sizes;
}

// A tensor with the logits' shape, type and device, which has no memory for them.
inline Tensor linear_logits(const Tensor& input, const Tensor& linear_weight) {
  return at::empty({}, input.options()).expand_symint(logit_sizes(input.sym_size(0), linear_weight));
}

// (V, D): a row for each logit. Of the weight or its gradient.
inline Tensor weight_matrix(const Tensor& linear_weight) {
  const auto sizes = linear_weight.sizes();
  if (linear_weight.dim() == 2) return linear_weight;
  return linear_weight.reshape({c10::multiply_integers(sizes.slice(0, sizes.size() - 1)), sizes.back()});
}

inline void check_linear_shapes(const Tensor& input, const Tensor& linear_weight, OptionalTensor linear_bias) {
  TORCH_CHECK(input.dim() == 2, kLinearName, ": input must have the shape (N, in_features), got ", input.sym_sizes());
  TORCH_CHECK(linear_weight.dim() >= 2, kLinearName, ": linear_weight must have at least two dimensions, got shape ",
              linear_weight.sym_sizes());
  TORCH_CHECK(input.sym_size(1) == linear_weight.sym_size(-1), kLinearName,
              ": input and linear_weight must have the same last dimension (in_features), got shapes ",
              input.sym_sizes(), " and ", linear_weight.sym_sizes());
  const auto expected = linear_weight.sym_sizes().slice(0, linear_weight.dim() - 1);
  TORCH_CHECK(!is_present(linear_bias) || linear_bias->sym_sizes() == expected, kLinearName,
              ": linear_bias must have the shape ", expected, " (linear_weight's without the last dimension), got ",
              linear_bias->sym_sizes());
}

inline void check_linear(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                         OptionalTensor linear_bias) {
  check_linear_shapes(input, linear_weight, linear_bias);
  check_floating(kLinearName, "input", input);
  check_devices(kLinearName,
                {{"input", input}, {"linear_weight", linear_weight}, {"linear_bias", linear_bias}, {"target", target}});
  for (const auto& [name, tensor] : {NamedTensor("linear_weight", linear_weight), {"linear_bias", linear_bias}}) {
    TORCH_CHECK(!tensor || tensor->scalar_type() == input.scalar_type(), kLinearName, ": ", name,
                " must have input's type ", input.scalar_type(), ", got ", type_and_shape(*tensor));
  }
}

// --- Rows that are computed ---

// What belongs to each row.
struct Batch {
  Tensor input, target;
  CrossEntropyWeights weights;

  int64_t rows() const { return input.size(0); }

  template <class Choose>
  Batch chosen(Choose choose) const {
    Batch batch{choose(input), choose(target), weights};
    if (is_present(weights.sample_weight)) batch.weights.sample_weight = choose(*weights.sample_weight);
    return batch;
  }
  Batch chunk(int64_t begin, int64_t count) const {
    return chosen([&](const Tensor& tensor) { return tensor.narrow(0, begin, count); });
  }
  Batch gathered(const Tensor& rows) const {
    return rows.defined() ? chosen([&](const Tensor& tensor) { return tensor.index_select(0, rows); }) : *this;
  }
};

// Whether a row has a target that counts.
inline Tensor counting_rows(const Tensor& target, int64_t ignore_index) {
  const Tensor counts = target.to(at::kLong).ne(ignore_index);  // uint8 would wrap a negative index around
  return counts.dim() > 1 ? counts.flatten(1).any(1) : counts;
}

// The rows to be computed; undefined where they are all.
inline Tensor rows_to_compute(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                              OptionalBool skip_ignored) {
  if (has_probabilities(logits, target) || !skip_ignored.value_or(target.is_cpu())) return {};
  const Tensor rows = counting_rows(target, ignore_index).nonzero().flatten();
  return rows.size(0) == target.size(0) ? Tensor() : rows;
}

// Back to all rows; those that were not computed hold zeros.
inline Tensor scattered(const Tensor& of_rows, const Tensor& rows, int64_t count) {
  if (!rows.defined()) return of_rows;
  at::DimVector sizes(of_rows.sizes());
  sizes[0] = count;
  return at::zeros(sizes, of_rows.options()).index_copy_(0, rows, of_rows);
}

// An input to be multiplied with the gradient of its logits. Where ignored rows are among the others that gradient is
// 0, which would make NaN of what is not finite.
inline Tensor without_ignored(const Tensor& input, const Tensor& logits, const Tensor& target, const Tensor& rows,
                              int64_t ignore_index) {
  if (rows.defined() || has_probabilities(logits, target)) return input;
  return input.masked_fill(counting_rows(target, ignore_index).logical_not_().unsqueeze(1), 0);
}

// --- Chunks ---

// known_in_forward: the gradient is, but for a factor.
template <class Size = int64_t>
LinearProblem<Size> linear_problem(const Tensor& input, const Tensor& linear_weight, const LinearOptions& linear,
                                   bool known_in_forward, bool wants_weight) {
  const auto size = [](const Tensor& tensor, int64_t d) -> Size {
    if constexpr (std::is_same_v<Size, int64_t>) {
      return tensor.size(d);
    } else {
      return tensor.sym_size(d);
    }
  };
  const auto type = product_type(input, linear);
  const bool half = type == at::kBFloat16 || type == at::kHalf, on_cpu = input.device().is_cpu();
  LinearProblem<Size> problem{.rows = size(input, 0), .features = size(input, 1), .logits = 1};
  for (int64_t d = 0; d + 1 < linear_weight.dim(); ++d) problem.logits = problem.logits * size(linear_weight, d);
  problem.logit_bytes = static_cast<int64_t>(c10::elementSize(type));
  // Where products are as narrow as their operands, each part of the sum is a product of its own.
  if (half && wants_weight) problem.accumulator_bytes = on_cpu ? 6 : 4;
  problem.best_chunk = !on_cpu ? 4096 : half ? 1024 : 512;
  problem.known_in_forward = known_in_forward;
  problem.adds_up = type != at::kHalf;  // each chunk of float16 logits has a scale of its own
  problem.memory = linear.memory;
  problem.chunk = linear.chunk;
  return problem;
}

// The logits of some rows at a time, always in the same place.
class Logits {
 public:
  // memory: of one dimension, with room for the logits of as many rows as are asked for at once.
  Logits(const Tensor& linear_weight, OptionalTensor linear_bias, const Tensor& memory)
      : weight_(weight_matrix(linear_weight).t()),
        sizes_(linear_weight.sizes().slice(0, linear_weight.dim() - 1)),
        memory_(memory) {
    if (is_present(linear_bias)) bias_ = linear_bias->reshape({weight_.size(1)});
  }
  static Tensor memory_for(int64_t rows, const Tensor& linear_weight) {
    const auto sizes = linear_weight.sizes();
    const int64_t logits = c10::multiply_integers(sizes.slice(0, sizes.size() - 1));
    return with_huge_pages(at::empty({rows * logits}, linear_weight.options()));
  }

  // (rows, V)
  Tensor matrix(const Tensor& input) const {
    const int64_t rows = input.size(0), logits = weight_.size(1);
    Tensor result = memory_.narrow(0, 0, rows * logits).view({rows, logits});
    linear_into(result, input, weight_, bias_);
    return result;
  }
  // (rows, C, d1, ...)
  Tensor shaped(const Tensor& matrix) const {
    at::DimVector sizes{matrix.size(0)};
    sizes.append(sizes_.begin(), sizes_.end());
    return matrix.view(sizes);
  }

 private:
  const Tensor weight_;
  std::optional<Tensor> bias_;
  const at::DimVector sizes_;
  const Tensor memory_;
};

// Calls with the first row and the number of rows of each chunk; once where there are no rows.
template <class Call>
void for_each_chunk(int64_t rows, int64_t chunk, Call call) {
  const int64_t step = std::max<int64_t>(chunk, 1);
  for (int64_t begin = 0; begin == 0 || begin < rows; begin += step) call(begin, std::min(step, rows - begin));
}

// --- Gradients ---

// In the accumulate type. On a CPU a sum in another type than its terms' copies them all: of some rows at a time.
inline Tensor column_sums(const Tensor& matrix) {
  const auto type = accumulate_type(matrix.scalar_type());
  if (type == matrix.scalar_type() || !matrix.is_cpu()) return matrix.sum(0, false, type);
  constexpr int64_t kBytes = int64_t(1) << 18;
  const int64_t rows = std::max<int64_t>(kBytes / (std::max<int64_t>(matrix.size(1), 1) * 4), 1);
  Tensor sums = at::zeros({matrix.size(1)}, matrix.options().dtype(type));
  for (int64_t first = 0; first < matrix.size(0); first += rows) {
    sums.add_(matrix.narrow(0, first, std::min(rows, matrix.size(0) - first)).sum(0, false, type));
  }
  return sums;
}

// Those of input, weight and bias, which chunks add to.
class LinearGrads {
 public:
  LinearGrads(const Tensor& input, const Tensor& linear_weight, std::array<bool, 3> wanted)
      : wanted_(wanted), weight_(weight_matrix(linear_weight)) {
    const auto sums = input.options().dtype(accumulate_type(input.scalar_type()));
    if (wanted[0]) grad_input_ = at::empty(input.sizes(), sums);
    if (wanted[1]) grad_weight_.emplace(weight_.sizes(), input.options());
    if (wanted[2]) grad_bias_ = at::zeros({weight_.size(0)}, sums);
  }

  // input: without what ignored rows hold.
  void add(const Tensor& grad_logits, const Tensor& input, int64_t begin) {
    if (wanted_[0]) {
      product_into(grad_input_.narrow(0, begin, input.size(0)), grad_logits, weight_);
    }
    if (wanted_[1]) grad_weight_->add(grad_logits.t(), input);
    if (wanted_[2]) grad_bias_.add_(column_sums(grad_logits));
  }

  const Tensor& grad_input() const { return grad_input_; }
  Tensor grad_weight() { return wanted_[1] ? grad_weight_->result() : Tensor(); }
  const Tensor& grad_bias() const { return grad_bias_; }

 private:
  const std::array<bool, 3> wanted_;
  const Tensor weight_;
  Tensor grad_input_, grad_bias_;
  std::optional<ProductSum> grad_weight_;
};

inline Tensor or_empty(const Tensor& tensor, const at::TensorOptions& options) {
  return tensor.defined() ? tensor : at::empty({0}, options);
}

}  // namespace fusedloss::ops
