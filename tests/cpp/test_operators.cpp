// The operators as a C++ program sees them: through the dispatcher, with gradients.

#include <torch/torch.h>

#include "check.h"

int main() {
  using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  const auto cross_entropy = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("fusedloss::cross_entropy", "")
                                 .typed<Outputs(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                                int64_t, int64_t, double, double, double, bool, bool,
                                                std::optional<bool>, const std::optional<at::Tensor>&, bool, bool)>();
  torch::manual_seed(0);
  const auto target = torch::randint(100, {33});
  const auto data = torch::randn({33, 100});
  const auto native_logits = data.clone().requires_grad_();
  const auto native = torch::nn::functional::cross_entropy(
      native_logits, target, torch::nn::functional::CrossEntropyFuncOptions().label_smoothing(0.1));
  native.backward();
  for (const bool grad_in_forward : {false, true}) {
    const auto logits = data.clone().requires_grad_();
    const auto loss = std::get<0>(cross_entropy.call(logits, target, std::nullopt, 1, -100, 0.1, 0, 0, false, false,
                                                     grad_in_forward, std::nullopt, false, false));
    loss.backward();
    EXPECT(torch::allclose(loss, native), "loss %g, native %g", loss.item<double>(), native.item<double>());
    EXPECT(torch::allclose(logits.grad(), native_logits.grad(), 1e-5, 1e-8), "the gradients differ");
  }
  return finish("operators");
}
