// The table of contents of the C++ side: schemas, then which function answers under which dispatch key.

#include <torch/library.h>

#include <string>
#include <tuple>

#include "ops/autocast.h"
#include "ops/dispatch.h"
#include "ops/double_backward.h"
#include "ops/elementwise_op.h"
#include "ops/losses.h"

namespace fusedloss {

using namespace ops;

// The options as a schema lists them.
template <class Options>
static std::string words_of() {
  std::string list;
  for_each_option<Options>([&](const auto& option) { list += (list.empty() ? "" : ", ") + option.words(); });
  return list;
}

// Defines the operator that a function is. Each {} is filled by a list of options (csrc/ops/options.h).
template <Backend kBackend, auto kFunction, class... Options>
static void define(torch::Library& m, std::string schema) {
  const std::string name = schema.substr(0, schema.find('('));
  (schema.replace(schema.find("{}"), 2, words_of<Options>()), ...);
  m.def(schema.c_str());
  Operator<kFunction>::find(kBackend, name);
}

// The operators of a loss. reduction: 0 none, 1 mean, 2 sum. Forward operators return what their backward needs behind
// the loss; NAME_with_grad is forward and backward in one pass.
template <Backend kBackend>
static void define(torch::Library& m, CrossEntropy) {
  define<kBackend, &CrossEntropy::forward, CrossEntropyWeights, CrossEntropyOptions, CrossEntropyAnswers,
         TrainingOptions>(m,
                          "cross_entropy(Tensor logits, Tensor target, {}, {}, {}, {}) "
                          "-> (Tensor loss, Tensor lse, Tensor entropy, Tensor argmax, "
                          "Tensor row_max, Tensor row_log_sum, Tensor row_gap, Tensor divisor)");
  define<kBackend, &CrossEntropy::with_grad, CrossEntropyWeights, CrossEntropyOptions>(
      m,
      "cross_entropy_with_grad(Tensor logits, Tensor target, {}, Tensor? grad_scale, {}, bool upcast, "
      "Tensor(a!) grad_logits, Tensor(b!)? scale=None, Tensor(c!)? argmax=None) -> Tensor loss");
  define<kBackend, &CrossEntropy::backward, CrossEntropyWeights, CrossEntropyOptions>(
      m,
      "cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor logits, Tensor target, "
      "{}, Tensor row_max, Tensor row_log_sum, Tensor? row_gap, Tensor divisor, {}, bool[2] output_mask) "
      "-> (Tensor grad_logits, Tensor grad_target)");
}

template <Backend kBackend>
static void define(torch::Library& m, CrossEntropyFromShards) {
  using Loss = CrossEntropyFromShards;
  define<kBackend, &Loss::statistics, CrossEntropyWeights, CrossEntropyOptions, ClassShard, CrossEntropyAnswers>(
      m, "cross_entropy_shard(Tensor logits, Tensor target, {}, {}, {}, {}, bool upcast=False) -> Tensor");
  define<kBackend, &Loss::forward, CrossEntropyWeights, MergedRows, CrossEntropyOptions, ClassShard, TrainingOptions>(
      m,
      "cross_entropy_from_shards(Tensor logits, Tensor target, {}, {}, {}, {}, Tensor loss, Tensor? lse, "
      "Tensor? entropy, {}) -> (Tensor loss, Tensor lse, Tensor entropy)");
  define<kBackend, &Loss::write_grad, CrossEntropyWeights, MergedRows, CrossEntropyOptions, ClassShard>(
      m,
      "cross_entropy_from_shards_grad_(Tensor logits, Tensor target, {}, {}, {}, {}, Tensor? grad_scale, "
      "Tensor(a!) grad_logits, Tensor(b!)? scale=None) -> ()");
  define<kBackend, &Loss::backward, CrossEntropyWeights, MergedRows, CrossEntropyOptions, ClassShard>(
      m,
      "cross_entropy_from_shards_backward(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor logits, "
      "Tensor target, {}, {}, {}, {}, bool[2] output_mask) -> (Tensor grad_logits, Tensor grad_target)");
}

// with_grad and backward are given operands of one type; `gradients` makes of the gradient of the logits those of the
// linear layer.
template <Backend kBackend>
static void define(torch::Library& m, LinearCrossEntropy) {
  using Loss = LinearCrossEntropy;
  define<kBackend, &Loss::forward, CrossEntropyWeights, CrossEntropyOptions, CrossEntropyAnswers, LinearOptions>(
      m,
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, {}, {}, {}, {}) "
      "-> (Tensor loss, Tensor lse, Tensor entropy, Tensor argmax, "
      "Tensor row_max, Tensor row_log_sum, Tensor row_gap, Tensor divisor)");
  define<kBackend, &Loss::with_grad, CrossEntropyWeights, CrossEntropyOptions, LinearOptions>(
      m,
      "linear_cross_entropy_with_grad(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, {}, {}, "
      "bool return_argmax, bool one_chunk, bool[3] output_mask, {}) "
      "-> (Tensor loss, Tensor argmax, Tensor grad_logits, Tensor rows, Tensor scale, "
      "Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  define<kBackend, &Loss::gradients>(
      m,
      "linear_cross_entropy_gradients(Tensor grad_output, Tensor grad_logits, Tensor rows, Tensor? scale, "
      "Tensor input, Tensor linear_weight, Tensor target, SymInt ignore_index, ScalarType weight_type, "
      "bool[3] output_mask, ScalarType? input_type=None) "
      "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  define<kBackend, &Loss::backward, CrossEntropyWeights, CrossEntropyOptions, LinearOptions>(
      m,
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor input, "
      "Tensor linear_weight, Tensor target, Tensor? linear_bias, {}, Tensor row_max, Tensor row_log_sum, "
      "Tensor? row_gap, Tensor divisor, {}, ScalarType weight_type, bool[4] output_mask, {}) "
      "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_target, Tensor grad_linear_bias)");
}

template <Backend kBackend>
static void define(torch::Library& m, LinearCrossEntropyShard) {
  using Loss = LinearCrossEntropyShard;
  define<kBackend, &Loss::statistics, CrossEntropyWeights, CrossEntropyOptions, ClassShard, CrossEntropyAnswers,
         LinearOptions>(m,
                        "linear_cross_entropy_shard(Tensor input, Tensor linear_weight, Tensor target, "
                        "Tensor? linear_bias, {}, {}, {}, {}, {}) -> Tensor");
  define<kBackend, &Loss::backward, CrossEntropyWeights, MergedRows, CrossEntropyOptions, ClassShard, LinearOptions>(
      m,
      "linear_cross_entropy_shard_backward(Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor input, "
      "Tensor linear_weight, Tensor target, Tensor? linear_bias, {}, {}, {}, {}, ScalarType weight_type, "
      "bool[4] output_mask, {}) "
      "-> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_target, Tensor grad_linear_bias)");
}

template <Backend kBackend>
static void define(torch::Library& m, Nll) {
  define<kBackend, &Nll::forward, Nll::Options, Nll::Training>(
      m, "nll(Tensor log_probs, Tensor target, Tensor? weight, {}, {}) -> (Tensor loss, Tensor divisor)");
  define<kBackend, &Nll::backward, Nll::Options>(
      m,
      "nll_backward(Tensor grad_loss, Tensor log_probs, Tensor target, Tensor? weight, Tensor divisor, {}) "
      "-> Tensor grad_log_probs");
}

template <Backend kBackend, class Loss>
static void define(torch::Library& m, Elementwise<Loss>) {
  using Operators = Elementwise<Loss>;
  using Weights = typename Loss::Weights;
  const std::string name = Loss::kName;
  define<kBackend, &Operators::forward, Weights, ElementwiseOptions, typename Loss::Training>(
      m, name + "(Tensor input, Tensor target, {}, {}, {}) -> (Tensor loss, Tensor divisor)");
  define<kBackend, &Operators::with_grad, Weights, ElementwiseOptions>(
      m, name +
             "_with_grad(Tensor input, Tensor target, {}, Tensor? grad_scale, {}, bool upcast, "
             "Tensor(a!) grad_input, Tensor(b!)? scale=None) -> Tensor loss");
  define<kBackend, &Operators::backward, Weights, ElementwiseOptions>(
      m, name +
             "_backward(Tensor grad_loss, Tensor input, Tensor target, {}, Tensor divisor, {}, bool[2] output_mask) "
             "-> (Tensor grad_input, Tensor grad_target)");
}

template <Backend kBackend>
static void define(torch::Library& m) {
  for_each_loss([&](auto loss) { define<kBackend>(m, loss); });
  define<kBackend>(m, LinearCrossEntropyShard());
  define<kBackend, &rescale_grad_>(
      m, "rescale_grad_(Tensor(a!) grad, Tensor grad_output, Tensor? scale, bool keep_zeros) -> ()");
  define<kBackend, &rescale_grad>(
      m, "rescale_grad(Tensor grad, Tensor grad_output, Tensor? scale, bool keep_zeros) -> Tensor");
}

template <Backend kBackend, auto kOperator>
static const char* name_of() {
  return Operator<kOperator>::handle(kBackend)->operator_name().name.c_str();
}

// Makes a function answer for an operator; most operators are answered by the function that they are defined for.
template <Backend kBackend, auto kOperator, auto kFunction = kOperator>
static void answer(torch::Library& m) {
  m.impl(name_of<kBackend, kOperator>(), Operator<kFunction>::template under<kBackend>);
}

// The same, counted: the operators that a call of a loss runs one of, once.
template <Backend kBackend, auto kOperator>
static void answer_counted(torch::Library& m) {
  m.impl(name_of<kBackend, kOperator>(), Operator<kOperator>::template counted<kBackend>);
}

template <Backend kBackend>
static void implement(torch::Library& m) {
  for_each_loss([&]<class Loss>(Loss) {
    constexpr bool kShared = requires { &Loss::statistics; };
    if constexpr (kShared) {
      answer_counted<kBackend, &Loss::statistics>(m);
      answer<kBackend, &Loss::forward>(m);
    } else {
      answer_counted<kBackend, &Loss::forward>(m);
    }
    answer<kBackend, &Loss::backward>(m);
    if constexpr (requires { &Loss::with_grad; }) answer_counted<kBackend, &Loss::with_grad>(m);
    if constexpr (requires { &Loss::gradients; }) answer<kBackend, &Loss::gradients>(m);
    if constexpr (requires { &Loss::write_grad; }) answer<kBackend, &Loss::write_grad>(m);
  });
  answer_counted<kBackend, &LinearCrossEntropyShard::statistics>(m);
  answer<kBackend, &LinearCrossEntropyShard::backward>(m);
  answer<kBackend, &rescale_grad_>(m);
  answer<kBackend, &rescale_grad>(m);
}

template <Backend kBackend>
static void implement_autocast(torch::Library& m) {
  for_each_loss([&]<class Loss>(Loss) { answer<kBackend, &Loss::forward, &Autocast<Loss>::call>(m); });
}

template <Backend kBackend>
static void implement_autograd(torch::Library& m) {
  for_each_loss([&]<class Loss>(Loss) {
    answer<kBackend, &Loss::forward, &Loss::autograd>(m);
    m.impl(name_of<kBackend, &Loss::backward>(), torch::CppFunction::makeFromBoxedFunction<&backward_operator>());
  });
}

TORCH_LIBRARY(fusedloss, m) { define<Backend::compiled>(m); }
TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { implement<Backend::compiled>(m); }
#if defined(FUSEDLOSS_WITH_CUDA)
TORCH_LIBRARY_IMPL(fusedloss, CUDA, m) { implement<Backend::compiled>(m); }
#endif
TORCH_LIBRARY_IMPL(fusedloss, Meta, m) { implement<Backend::compiled>(m); }
TORCH_LIBRARY_IMPL(fusedloss, AutocastCPU, m) { implement_autocast<Backend::compiled>(m); }
TORCH_LIBRARY_IMPL(fusedloss, AutocastCUDA, m) { implement_autocast<Backend::compiled>(m); }
TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) { implement_autograd<Backend::compiled>(m); }

// Whatever device Triton has a driver for; of the CPU, its interpreter.
TORCH_LIBRARY(fusedloss_triton, m) { define<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, CPU, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, CUDA, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, XPU, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, Meta, m) { implement<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, AutocastCPU, m) { implement_autocast<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, AutocastCUDA, m) { implement_autocast<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, AutocastXPU, m) { implement_autocast<Backend::triton>(m); }
TORCH_LIBRARY_IMPL(fusedloss_triton, Autograd, m) { implement_autograd<Backend::triton>(m); }

}  // namespace fusedloss
