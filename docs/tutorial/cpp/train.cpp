// Trains a classifier of points in a plane with fusedloss's cross entropy, without Python.

#include <torch/torch.h>

#include <cstdio>

// The operator, as the dispatcher knows it. `typed` compares this signature with the schema when the program starts.
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using CrossEntropy = Outputs(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t, int64_t,
                             double, double, double, bool, bool, std::optional<bool>, const std::optional<at::Tensor>&,
                             bool, bool);

static at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target) {
  static const auto operation =
      c10::Dispatcher::singleton().findSchemaOrThrow("fusedloss::cross_entropy", "").typed<CrossEntropy>();
  const int64_t mean = 1, ignore_index = -100;
  return std::get<0>(operation.call(logits, target, std::nullopt, mean, ignore_index, /*label_smoothing=*/0,
                                    /*z_loss=*/0, /*logit_softcap=*/0, /*return_lse=*/false, /*upcast=*/false,
                                    /*grad_in_forward=*/std::nullopt, /*grad_scale=*/std::nullopt, /*inplace=*/false,
                                    /*statistics=*/false));
}

int main() {
  torch::manual_seed(0);
  const auto points = torch::randn({512, 2});
  const auto classes = (points.select(1, 0) * points.select(1, 1) > 0).to(torch::kLong);  // which quadrants

  torch::nn::Sequential model(torch::nn::Linear(2, 32), torch::nn::ReLU(), torch::nn::Linear(32, 2));
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(0.01));
  for (int step = 0; step <= 200; ++step) {
    optimizer.zero_grad();
    const auto logits = model->forward(points);
    const auto loss = cross_entropy(logits, classes);
    if (step % 100 == 0) std::printf("step %3d, loss %.3f\n", step, loss.item<double>());
    loss.backward();
    optimizer.step();
  }
  const double right = (model->forward(points).argmax(1) == classes).to(torch::kDouble).mean().item<double>();
  std::printf("%.0f %% right\n", 100 * right);
  return right > 0.95 ? 0 : 1;
}
