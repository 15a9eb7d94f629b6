// The losses for libtorch programs, in the style of torch::nn::functional:
//
//   auto loss = fusedloss::cross_entropy(logits, target, fusedloss::CrossEntropyOptions().label_smoothing(0.1));
//
// A call goes through the dispatcher to the operators, which libfusedloss.so registers (CMake's fusedloss::fusedloss),
// or, in a process that has imported it, the Python package. What they refuse, they refuse with the exceptions that
// native torch throws: c10::IndexError for a class that does not exist, c10::ValueError for options that contradict
// each other, c10::NotImplementedError for a type or a device without kernels, and c10::Error for shapes that do not
// fit.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/arg.h>
#include <torch/enum.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>

namespace fusedloss {

// torch::kNone, torch::kSum, or torch::kMean: over what counts.
using Reduction = std::variant<torch::enumtype::kNone, torch::enumtype::kMean, torch::enumtype::kSum>;

// Whose kernels run: those compiled for the tensors' device, or Triton's, which a process has that imported the Python
// package.
enum class Backend { compiled, triton };

// A number, or a tensor of one element on the device of the input, where it stays; or neither.
class Number {
 public:
  Number() = default;
  Number(double value) : value_(value) {}
  Number(at::Tensor tensor) : tensor_(std::move(tensor)) {}

  std::optional<at::Tensor> on(const at::Device& device) const {
    return value_ ? at::scalar_tensor(*value_, at::TensorOptions(at::kDouble).device(device)) : tensor_;
  }

 private:
  std::optional<double> value_;
  std::optional<at::Tensor> tensor_;
};

// The grad_output that backward will be called with.
using GradScale = Number;

struct CrossEntropyOptions {
  // A weight for each class, of shape (C); with class indices in the type of the logits.
  TORCH_ARG(at::Tensor, weight);
  // torch::kMean: over the weights of the targets that count, or over all positions for probabilities.
  TORCH_ARG(Reduction, reduction) = torch::kMean;
  // Class indices equal to it give no loss and no gradient. Not for probabilities.
  TORCH_ARG(std::int64_t, ignore_index) = -100;
  // The part of the mass that is spread evenly over the classes, at most 1 (arXiv:1512.00567).
  TORCH_ARG(double, label_smoothing) = 0;
  // Adds z_loss * lse^2 to the loss of each position that counts (arXiv:2204.02311, section 5).
  TORCH_ARG(double, z_loss) = 0;
  // Multiplies the logits first; positive: an inverse temperature.
  TORCH_ARG(double, logit_scale) = 1;
  // Replaces the (scaled) logits by cap * tanh(logits / cap) (arXiv:2408.00118, section 2); 0: does not.
  TORCH_ARG(double, logit_softcap) = 0;
  // With torch::kMean, what the sum of the losses is divided by instead of by what counts; any real type. Where nothing
  // counts the loss is 0, in its place in the graph, and the gradient 0.
  TORCH_ARG(Number, denominator);
  // Of the shape of the unreduced loss; multiplies the whole loss of a position, and its share of what a mean is
  // divided by.
  TORCH_ARG(at::Tensor, sample_weight);
  // Whether forward also writes the gradient, so that the logits are read once. Absent: where the loss is reduced,
  // nothing but the logits requires grad, neither lse nor entropy is returned, no hooks take what is saved, and, for
  // float16, grad_scale is given. Another grad_output than grad_scale costs backward a pass over the gradient.
  TORCH_ARG(std::optional<bool>, grad_in_forward);
  // A hint, such as 1 / accumulation steps: then backward needs no pass. Absent: 1.
  TORCH_ARG(GradScale, grad_scale);
  // Write the gradient over the logits, which must not be used afterwards; autograd throws where something needs their
  // former values.
  TORCH_ARG(bool, inplace) = false;
  TORCH_ARG(Backend, backend) = Backend::compiled;
};

struct LinearCrossEntropyOptions {
  // Of the shape of the layer's weight without its last dimension.
  TORCH_ARG(at::Tensor, linear_bias);
  // Of its logits' loss; grad_in_forward, grad_scale and inplace are of no account.
  TORCH_ARG(CrossEntropyOptions, loss);
  // Bytes of scratch that may be used beside the arguments and their gradients. Absent: what the quickest plan takes.
  TORCH_ARG(std::optional<std::int64_t>, memory);
  // Whether rows without a target that counts are left out of the matrix products, for which the host waits for a GPU.
  // Absent: on a CPU.
  TORCH_ARG(std::optional<bool>, skip_ignored);
};

struct NLLLossOptions {
  // A weight for each class, of shape (C), in the type of the input.
  TORCH_ARG(at::Tensor, weight);
  // torch::kMean: over the weights of the targets that count.
  TORCH_ARG(Reduction, reduction) = torch::kMean;
  // Targets equal to it give no loss and no gradient.
  TORCH_ARG(std::int64_t, ignore_index) = -100;
  TORCH_ARG(Backend, backend) = Backend::compiled;
};

struct BinaryCrossEntropyWithLogitsOptions {
  // Multiplies the loss; broadcasts to the shape of the input.
  TORCH_ARG(at::Tensor, weight);
  // Multiplies the loss of the positive part; broadcasts to the shape of the input.
  TORCH_ARG(at::Tensor, pos_weight);
  // torch::kMean: over the elements that are not ignored.
  TORCH_ARG(Reduction, reduction) = torch::kMean;
  // Elements whose target equals it give no loss and no gradient, and do not count in the mean.
  TORCH_ARG(std::optional<std::int64_t>, ignore_index);
  // These are as for cross entropy.
  TORCH_ARG(std::optional<bool>, grad_in_forward);
  TORCH_ARG(GradScale, grad_scale);
  TORCH_ARG(bool, inplace) = false;
  TORCH_ARG(Backend, backend) = Backend::compiled;
};

struct BinaryCrossEntropyOptions {
  // Multiplies the loss; broadcasts to the shape of the input.
  TORCH_ARG(at::Tensor, weight);
  // torch::kMean: over the elements that are not ignored.
  TORCH_ARG(Reduction, reduction) = torch::kMean;
  // Elements whose target equals it give no loss and no gradient, and do not count in the mean.
  TORCH_ARG(std::optional<std::int64_t>, ignore_index);
  // These are as for cross entropy; in float16, whose range it exceeds, the gradient is never written in forward.
  TORCH_ARG(std::optional<bool>, grad_in_forward);
  TORCH_ARG(GradScale, grad_scale);
  TORCH_ARG(Backend, backend) = Backend::compiled;
};

// How the operators (csrc/register.cpp) are called.
namespace detail {

inline constexpr char kCrossEntropy[] = "cross_entropy";
inline constexpr char kLinearCrossEntropy[] = "linear_cross_entropy";
inline constexpr char kNLL[] = "nll";
inline constexpr char kBCEWithLogits[] = "bce_with_logits";
inline constexpr char kBCE[] = "bce";

// loss; lse, entropy, argmax; and what backward needs
using CrossEntropyOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LossAndDivisor = std::tuple<at::Tensor, at::Tensor>;

// The dispatcher takes tensors by reference, and all else by value.
template <class T>
struct Parameter {
  using Type = T;
};
template <>
struct Parameter<at::Tensor> {
  using Type = const at::Tensor&;
};
template <>
struct Parameter<std::optional<at::Tensor>> {
  using Type = const std::optional<at::Tensor>&;
};

// Calls an operator with all arguments of its schema. The signature is made of what is passed, and compared with the
// operator's once: after a change of the schema alone, `typed` throws, where a call would read arguments from the wrong
// places.
template <const char* kName, class Result, class... Arguments>
Result call(Backend backend, const Arguments&... arguments) {
  using Signature = Result(typename Parameter<Arguments>::Type...);
  const auto find = [](const std::string& name_space) {
    const std::string name = name_space + "::" + kName;
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Signature>();
  };
  static const std::array handles{find("fusedloss"), find("fusedloss_triton")};
  return handles[static_cast<std::size_t>(backend)].call(arguments...);
}

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

inline std::optional<c10::SymInt> symbolic(std::optional<std::int64_t> number) {
  return number ? std::optional<c10::SymInt>(*number) : std::nullopt;
}

inline std::int64_t code(const Reduction& reduction) { return torch::enumtype::reduction_get_enum(reduction); }

// Which answers are wanted beside the loss.
struct Wanted {
  bool lse = false, entropy = false, argmax = false, upcast = false;
};

inline CrossEntropyOutputs cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                         const CrossEntropyOptions& options, const Wanted& wanted) {
  return call<kCrossEntropy, CrossEntropyOutputs>(
      options.backend(), logits, target, optional(options.weight()), optional(options.sample_weight()),
      options.denominator().on(logits.device()), code(options.reduction()), c10::SymInt(options.ignore_index()),
      options.label_smoothing(), options.z_loss(), options.logit_scale(), options.logit_softcap(), wanted.lse,
      wanted.entropy, wanted.argmax, wanted.upcast, options.grad_in_forward(), options.grad_scale().on(logits.device()),
      options.inplace(), /*statistics=*/false);
}

// Log-probabilities are the negative of losses with these.
inline CrossEntropyOptions log_prob_options(const CrossEntropyOptions& options) {
  return CrossEntropyOptions()
      .reduction(torch::kNone)
      .ignore_index(options.ignore_index())
      .logit_scale(options.logit_scale())
      .logit_softcap(options.logit_softcap())
      .backend(options.backend());
}

inline CrossEntropyOutputs linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight,
                                                const at::Tensor& target, const LinearCrossEntropyOptions& options,
                                                const Wanted& wanted) {
  const CrossEntropyOptions& loss = options.loss();
  return call<kLinearCrossEntropy, CrossEntropyOutputs>(
      loss.backend(), input, linear_weight, target, optional(options.linear_bias()), optional(loss.weight()),
      optional(loss.sample_weight()), loss.denominator().on(input.device()), code(loss.reduction()),
      c10::SymInt(loss.ignore_index()), loss.label_smoothing(), loss.z_loss(), loss.logit_scale(), loss.logit_softcap(),
      wanted.lse, wanted.entropy, wanted.argmax, wanted.upcast, /*product_type=*/std::optional<at::ScalarType>(),
      options.memory(), /*chunk=*/std::optional<std::int64_t>(), options.skip_ignored(),
      /*grad_in_forward=*/std::optional<bool>(), /*statistics=*/false);
}

}  // namespace detail

// Cross entropy between logits and targets; torch::nn::functional::cross_entropy in one pass.
//
// logits: (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16, any strides.
// target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8; or probabilities in the shape of
//   the logits.
// Returns the loss in the type of the logits (promoted with probabilities' and weight's; float32 under autocast), a
//   scalar or, unreduced, of the shape of the logits without C.
inline at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                const CrossEntropyOptions& options = {}) {
  return std::get<0>(detail::cross_entropy(logits, target, options, {}));
}

// The loss, and the log-sum-exp of each position's logits, ignored or not: differentiable, float32, or float64 for
// float64 logits.
inline std::pair<at::Tensor, at::Tensor> cross_entropy_with_lse(const at::Tensor& logits, const at::Tensor& target,
                                                                const CrossEntropyOptions& options = {}) {
  const auto outputs = detail::cross_entropy(logits, target, options, {.lse = true});
  return {std::get<0>(outputs), std::get<1>(outputs)};
}

// All that one read of the logits tells, of each position, ignored or not.
struct CrossEntropyAnswers {
  at::Tensor loss;
  at::Tensor lse, entropy;  // differentiable, float32, or float64 for float64 logits
  at::Tensor argmax;        // int64: the first of several, NaN before any number
};

inline CrossEntropyAnswers cross_entropy_with_answers(const at::Tensor& logits, const at::Tensor& target,
                                                      const CrossEntropyOptions& options = {}) {
  const auto outputs = detail::cross_entropy(logits, target, options, {.lse = true, .entropy = true, .argmax = true});
  return {std::get<0>(outputs), std::get<1>(outputs), std::get<2>(outputs), std::get<3>(outputs)};
}

// The log-probabilities of the target classes, 0 where the target is ignored, and the entropies of the softmax:
// differentiable, float32, or float64 for float64 logits. Of the options, ignore_index, logit_scale, logit_softcap and
// backend.
inline std::pair<at::Tensor, at::Tensor> token_log_probs(const at::Tensor& logits, const at::Tensor& target,
                                                         const CrossEntropyOptions& options = {}) {
  const auto unreduced = detail::log_prob_options(options);
  const auto outputs = detail::cross_entropy(logits, target, unreduced, {.entropy = true, .upcast = true});
  return {at::rsub(std::get<0>(outputs), 0), std::get<2>(outputs)};
}

// Cross entropy of the logits of a linear layer, which are made once, or a chunk of them at a time.
//
// input: (N, D); float32, float64, bfloat16 or float16.
// linear_weight: (C, D), or (C, d1, ..., D) for logits of shape (N, C, d1, ...).
// target: class indices of shape (N) or (N, d1, ...), or probabilities in the shape of the logits.
// Returns what cross_entropy does of the logits.
inline at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight,
                                       const at::Tensor& target, const LinearCrossEntropyOptions& options = {}) {
  return std::get<0>(detail::linear_cross_entropy(input, linear_weight, target, options, {}));
}

// token_log_probs of the logits of a linear layer.
inline std::pair<at::Tensor, at::Tensor> linear_token_log_probs(const at::Tensor& input,
                                                                const at::Tensor& linear_weight,
                                                                const at::Tensor& target,
                                                                const LinearCrossEntropyOptions& options = {}) {
  LinearCrossEntropyOptions unreduced = options;
  unreduced.loss(detail::log_prob_options(options.loss()));
  const auto outputs =
      detail::linear_cross_entropy(input, linear_weight, target, unreduced, {.entropy = true, .upcast = true});
  return {at::rsub(std::get<0>(outputs), 0), std::get<2>(outputs)};
}

// Negative log likelihood of log-probabilities; torch::nn::functional::nll_loss.
//
// input: log-probabilities, (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16.
// target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8.
// Returns the loss in the type of the input (float32 under autocast), a scalar or of the shape of the target.
inline at::Tensor nll_loss(const at::Tensor& input, const at::Tensor& target, const NLLLossOptions& options = {}) {
  return std::get<0>(detail::call<detail::kNLL, detail::LossAndDivisor>(
      options.backend(), input, target, detail::optional(options.weight()), detail::code(options.reduction()),
      c10::SymInt(options.ignore_index()), /*upcast=*/false));
}

// Binary cross entropy on logits; torch::nn::functional::binary_cross_entropy_with_logits.
//
// input: logits of any shape; float32, float64, bfloat16 or float16, any strides.
// target: of the same shape; any floating-point type, or integer or bool.
// Returns the loss in the type of a floating-point target, else of the input (float32 under autocast).
inline at::Tensor binary_cross_entropy_with_logits(const at::Tensor& input, const at::Tensor& target,
                                                   const BinaryCrossEntropyWithLogitsOptions& options = {}) {
  return std::get<0>(detail::call<detail::kBCEWithLogits, detail::LossAndDivisor>(
      options.backend(), input, target, detail::optional(options.weight()), detail::optional(options.pos_weight()),
      detail::code(options.reduction()), detail::symbolic(options.ignore_index()), /*upcast=*/false,
      options.grad_in_forward(), options.grad_scale().on(input.device()), options.inplace()));
}

// Binary cross entropy on probabilities, logarithms no smaller than -100; torch::nn::functional::binary_cross_entropy.
//
// input: probabilities of any shape; float32, float64, bfloat16 or float16, any strides.
// target: of the same shape and type, in [0, 1]; or integer or bool.
// Returns the loss in the type of the input (float32 under CPU autocast; CUDA autocast refuses, as native does).
inline at::Tensor binary_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                       const BinaryCrossEntropyOptions& options = {}) {
  return std::get<0>(detail::call<detail::kBCE, detail::LossAndDivisor>(
      options.backend(), input, target, detail::optional(options.weight()), detail::code(options.reduction()),
      detail::symbolic(options.ignore_index()), /*upcast=*/false, options.grad_in_forward(),
      options.grad_scale().on(input.device())));
}

}  // namespace fusedloss
