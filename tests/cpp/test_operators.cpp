// The losses as a C++ program sees them (include/fusedloss/losses.h), beside torch's own: with each option, and with
// gradients. Every operator is called, so that its signature in the header is compared with its schema.

#include <fusedloss/losses.h>
#include <torch/torch.h>

#include <functional>
#include <string>

#include "check.h"

namespace F = torch::nn::functional;
using at::Tensor;

namespace {

using Function = std::function<Tensor(const Tensor& input)>;

// The same loss, the same gradients of it and of its square, which need a grad_output that is not 1, and the same
// derivative of the square of a gradient, where it is not written over the input.
void expect_same(const char* name, const Tensor& data, const Function& ours, const Function& native,
                 bool inplace = false) {
  const auto grad_of = [&](const Function& loss, bool squared) {
    const Tensor input = data.clone().requires_grad_();
    const Tensor value = loss(input * 1);  // which inplace may overwrite
    (squared ? value.square().sum() : value.sum()).backward();
    return input.grad();
  };
  EXPECT(torch::allclose(ours(data.clone()), native(data), 1e-5, 1e-7), "%s", name);
  for (const bool squared : {false, true}) {
    // An entry may be the difference of two numbers as large as the largest.
    const Tensor expected = grad_of(native, squared);
    const double last_place = 1e-8 + 1e-6 * expected.abs().max().item<double>();
    EXPECT(torch::allclose(grad_of(ours, squared), expected, 1e-5, last_place), "%s, the gradient%s", name,
           squared ? " of the square" : "");
  }
  const auto grad_of_penalty = [&](const Function& loss) {
    const Tensor input = data.clone().requires_grad_();
    const Tensor value = loss(input * 1).square().sum();
    const Tensor grad = torch::autograd::grad({value}, {input}, {}, true, /*create_graph=*/true)[0];
    return torch::autograd::grad({grad.square().sum()}, {input})[0];
  };
  if (inplace) return;
  const Tensor penalty = grad_of_penalty(native);
  EXPECT(torch::allclose(grad_of_penalty(ours), penalty, 1e-4, 1e-4 * penalty.abs().max().item<double>()),
         "%s, the second derivative", name);
}

void test_cross_entropy() {
  using Options = fusedloss::CrossEntropyOptions;
  using Native = F::CrossEntropyFuncOptions;
  const Tensor logits = torch::randn({33, 100}), target = torch::randint(100, {33}), weight = torch::rand(100);
  const auto test = [&](const char* name, const Options& options, const Native& native) {
    expect_same(
        name, logits, [&](const Tensor& x) { return fusedloss::cross_entropy(x, target, options); },
        [&](const Tensor& x) { return F::cross_entropy(x, target, native); }, options.inplace());
  };
  test("the defaults", {}, {});
  test("weight", Options().weight(weight), Native().weight(weight));
  test("reduction none", Options().reduction(torch::kNone), Native().reduction(torch::kNone));
  test("reduction sum", Options().reduction(torch::kSum), Native().reduction(torch::kSum));
  test("ignore_index", Options().ignore_index(target[0].item<int64_t>()),
       Native().ignore_index(target[0].item<int64_t>()));
  test("label_smoothing", Options().label_smoothing(0.1), Native().label_smoothing(0.1));
  test("grad_in_forward", Options().grad_in_forward(true), {});
  test("not grad_in_forward", Options().grad_in_forward(false), {});
  test("grad_scale", Options().grad_scale(0.25), {});
  test("a tensor as grad_scale", Options().grad_scale(torch::tensor(0.25)), {});
  test("inplace", Options().inplace(true), {});

  const auto lse = [](const Tensor& x) { return x.logsumexp(1); };
  expect_same(
      "z_loss", logits, [&](const Tensor& x) { return fusedloss::cross_entropy(x, target, Options().z_loss(0.1)); },
      [&](const Tensor& x) { return F::cross_entropy(x, target) + 0.1 * lse(x).square().mean(); });
  expect_same(
      "logit_softcap", logits,
      [&](const Tensor& x) { return fusedloss::cross_entropy(x, target, Options().logit_softcap(2)); },
      [&](const Tensor& x) { return F::cross_entropy(2 * torch::tanh(x / 2), target); });
  expect_same(
      "logit_scale", logits,
      [&](const Tensor& x) { return fusedloss::cross_entropy(x, target, Options().logit_scale(0.5)); },
      [&](const Tensor& x) { return F::cross_entropy(x * 0.5, target); });
  const Tensor samples = torch::rand({33});
  const auto each = [&](const Tensor& x) { return F::cross_entropy(x, target, Native().reduction(torch::kNone)); };
  expect_same(
      "sample_weight", logits,
      [&](const Tensor& x) { return fusedloss::cross_entropy(x, target, Options().sample_weight(samples)); },
      [&](const Tensor& x) { return (each(x) * samples).sum() / samples.sum(); });
  expect_same(
      "denominator", logits,
      [&](const Tensor& x) { return fusedloss::cross_entropy(x, target, Options().denominator(7)); },
      [&](const Tensor& x) { return each(x).sum() / 7; });
  expect_same(
      "a tensor as denominator", logits,
      [&](const Tensor& x) {
        return fusedloss::cross_entropy(x, target, Options().denominator(torch::tensor({7})).sample_weight(samples));
      },
      [&](const Tensor& x) { return (each(x) * samples).sum() / 7; });
  const auto entropy = [](const Tensor& x) { return -(x.softmax(1) * x.log_softmax(1)).sum(1); };
  expect_same(
      "answers", logits,
      [&](const Tensor& x) {
        const auto answers = fusedloss::cross_entropy_with_answers(x, target);
        EXPECT(torch::equal(answers.argmax, x.argmax(1)), "the predictions");
        return answers.loss * answers.lse * answers.entropy;
      },
      [&](const Tensor& x) { return F::cross_entropy(x, target) * lse(x) * entropy(x); });
  expect_same(
      "token_log_probs", logits,
      [&](const Tensor& x) {
        const auto [log_probs, entropies] = fusedloss::token_log_probs(x, target, Options().logit_scale(2));
        return log_probs + 0.1 * entropies;
      },
      [&](const Tensor& x) {
        return (x * 2).log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1) + 0.1 * entropy(x * 2);
      });
  expect_same(
      "lse", logits,
      [&](const Tensor& x) {
        const auto [loss, lse] = fusedloss::cross_entropy_with_lse(x, target);
        return loss * lse;
      },
      [&](const Tensor& x) { return F::cross_entropy(x, target) * lse(x); });
}

void test_nll_loss() {
  using Options = fusedloss::NLLLossOptions;
  using Native = F::NLLLossFuncOptions;
  const Tensor input = torch::randn({33, 100}).log_softmax(1), target = torch::randint(100, {33});
  const Tensor weight = torch::rand(100);
  const auto test = [&](const char* name, const Options& options, const Native& native) {
    expect_same(
        name, input, [&](const Tensor& x) { return fusedloss::nll_loss(x, target, options); },
        [&](const Tensor& x) { return F::nll_loss(x, target, native); });
  };
  test("nll_loss", {}, {});
  test("nll_loss, weight and sum", Options().weight(weight).reduction(torch::kSum),
       Native().weight(weight).reduction(torch::kSum));
  test("nll_loss, ignore_index", Options().ignore_index(target[0].item<int64_t>()),
       Native().ignore_index(target[0].item<int64_t>()));
}

void test_binary_cross_entropy_with_logits() {
  using Options = fusedloss::BinaryCrossEntropyWithLogitsOptions;
  using Native = F::BinaryCrossEntropyWithLogitsFuncOptions;
  const Tensor input = torch::randn({33, 100}), target = torch::randint(2, {33, 100}).to(torch::kFloat);
  const Tensor weight = torch::rand(100), pos_weight = torch::rand(100);
  const auto test = [&](const char* name, const Options& options, const Native& native) {
    expect_same(
        name, input, [&](const Tensor& x) { return fusedloss::binary_cross_entropy_with_logits(x, target, options); },
        [&](const Tensor& x) { return F::binary_cross_entropy_with_logits(x, target, native); }, options.inplace());
  };
  test("with logits", {}, {});
  test("with logits, weight", Options().weight(weight), Native().weight(weight));
  test("with logits, pos_weight", Options().pos_weight(pos_weight), Native().pos_weight(pos_weight));
  test("with logits, none", Options().reduction(torch::kNone), Native().reduction(torch::kNone));
  test("with logits, in place for 0.5", Options().inplace(true).grad_scale(0.5), {});
  test("with logits, ignore_index", Options().ignore_index(0).reduction(torch::kSum),
       Native().weight(target).reduction(torch::kSum));
}

void test_binary_cross_entropy() {
  using Options = fusedloss::BinaryCrossEntropyOptions;
  using Native = F::BinaryCrossEntropyFuncOptions;
  const Tensor input = torch::rand({33, 100}), target = torch::randint(2, {33, 100}).to(torch::kFloat);
  const Tensor weight = torch::rand(100);
  const auto test = [&](const char* name, const Options& options, const Native& native) {
    expect_same(
        name, input, [&](const Tensor& x) { return fusedloss::binary_cross_entropy(x, target, options); },
        [&](const Tensor& x) { return F::binary_cross_entropy(x, target, native); });
  };
  test("bce", {}, {});
  test("bce, weight and sum", Options().weight(weight).reduction(torch::kSum),
       Native().weight(weight).reduction(torch::kSum));
  test("bce, in forward for 0.5", Options().grad_in_forward(true).grad_scale(0.5), {});
  test("bce, ignore_index", Options().ignore_index(0).reduction(torch::kSum),
       Native().weight(target).reduction(torch::kSum));
}

// The text of what a function throws.
template <class Error>
std::string error_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

void expect_part(const std::string& text, const std::string& part) {
  EXPECT(text.find(part) != std::string::npos, "no '%s' in: %s", part.c_str(), text.c_str());
}

void test_errors() {
  const Tensor logits = torch::randn({3, 4}), target = torch::tensor({0, 1, 2});
  const auto with = [&](const fusedloss::CrossEntropyOptions& options) {
    return [&, options] { fusedloss::cross_entropy(logits, target, options); };
  };
  using Options = fusedloss::CrossEntropyOptions;
  expect_part(error_of<c10::IndexError>([&] { fusedloss::cross_entropy(logits, target + 2); }), "4");
  expect_part(error_of<c10::ValueError>(with(Options().logit_softcap(-1))), "logit_softcap must be positive");
  expect_part(error_of<c10::Error>(with(Options().backend(fusedloss::Backend::triton))), "Triton");
  // An option that the header lacks, or has at another place.
  expect_part(error_of<c10::Error>([&] {
                fusedloss::detail::call<fusedloss::detail::kNLL, fusedloss::detail::LossAndDivisor>(
                    fusedloss::Backend::compiled, logits, target, std::optional<Tensor>(), int64_t{1},
                    c10::SymInt(-100));
              }),
              "wrong signature");
}

void test_linear_cross_entropy() {
  using Options = fusedloss::LinearCrossEntropyOptions;
  using OfLoss = fusedloss::CrossEntropyOptions;
  const Tensor input = torch::randn({33, 8}), weight = torch::randn({100, 8}), bias = torch::randn(100);
  Tensor target = torch::randint(100, {33});
  target[3] = target[5] = -100;
  const auto test = [&](const char* name, const Options& options, const F::CrossEntropyFuncOptions& native) {
    const auto logits = [&](const Tensor& x, const Tensor& w) { return F::linear(x, w, options.linear_bias()); };
    expect_same(
        name, input, [&](const Tensor& x) { return fusedloss::linear_cross_entropy(x, weight, target, options); },
        [&](const Tensor& x) { return F::cross_entropy(logits(x, weight), target, native); });
    expect_same(
        name, weight, [&](const Tensor& w) { return fusedloss::linear_cross_entropy(input, w, target, options); },
        [&](const Tensor& w) { return F::cross_entropy(logits(input, w), target, native); });
  };
  test("a linear layer", {}, {});
  test("its bias", Options().linear_bias(bias), {});
  test("its logits again", Options().memory(1), {});
  test("all of its rows", Options().skip_ignored(false), {});
  test("its unreduced loss", Options().loss(OfLoss().reduction(torch::kNone)),
       F::CrossEntropyFuncOptions().reduction(torch::kNone));
  test("its smooth loss", Options().loss(OfLoss().label_smoothing(0.1)),
       F::CrossEntropyFuncOptions().label_smoothing(0.1));
  const auto log_p = [&](const Tensor& x) { return F::log_softmax(F::linear(x, weight) * 2, 1); };
  const Tensor classes = target.clamp_min(0);
  expect_same(
      "its log-probabilities", input,
      [&](const Tensor& x) {
        const auto options = Options().loss(OfLoss().logit_scale(2));
        const auto [log_probs, entropies] = fusedloss::linear_token_log_probs(x, weight, classes, options);
        return log_probs + 0.1 * entropies;
      },
      [&](const Tensor& x) {
        const Tensor entropies = -(log_p(x).exp() * log_p(x)).sum(1);
        return log_p(x).gather(1, classes.unsqueeze(1)).squeeze(1) + 0.1 * entropies;
      });
}

}  // namespace

int main() {
  torch::manual_seed(0);
  test_cross_entropy();
  test_linear_cross_entropy();
  test_nll_loss();
  test_binary_cross_entropy_with_logits();
  test_binary_cross_entropy();
  test_errors();
  return finish("operators");
}
