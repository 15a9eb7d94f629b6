// The operators as a C++ program sees them: through the dispatcher, with gradients.

#include <torch/torch.h>

#include "check.h"

int main() {
  using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  const auto cross_entropy = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("fusedloss::cross_entropy", "")
                                 .typed<Outputs(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                                int64_t, int64_t, double, double, double, bool, bool)>();
  torch::manual_seed(0);
  const auto target = torch::randint(100, {33});
  auto logits = torch::randn({33, 100}, torch::requires_grad());
  auto native_logits = logits.detach().clone().requires_grad_();
  auto loss = std::get<0>(cross_entropy.call(logits, target, std::nullopt, 1, -100, 0.1, 0, 0, false, false));
  auto native = torch::nn::functional::cross_entropy(
      native_logits, target, torch::nn::functional::CrossEntropyFuncOptions().label_smoothing(0.1));
  loss.backward();
  native.backward();
  EXPECT(torch::allclose(loss, native), "loss %g, native %g", loss.item<double>(), native.item<double>());
  EXPECT(torch::allclose(logits.grad(), native_logits.grad(), 1e-5, 1e-8), "the gradients differ");
  return finish("operators");
}
