// Trains a classifier of points in a plane with fusedloss's cross entropy, without Python.

#include <fusedloss/losses.h>
#include <torch/torch.h>

#include <cstdio>

int main() {
  torch::manual_seed(0);
  const auto points = torch::randn({512, 2});
  const auto classes = (points.select(1, 0) * points.select(1, 1) > 0).to(torch::kLong);  // which quadrants

  torch::nn::Sequential model(torch::nn::Linear(2, 32), torch::nn::ReLU(), torch::nn::Linear(32, 2));
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(0.01));
  for (int step = 0; step <= 200; ++step) {
    optimizer.zero_grad();
    const auto logits = model->forward(points);
    const auto loss = fusedloss::cross_entropy(logits, classes, fusedloss::CrossEntropyOptions().label_smoothing(0.01));
    if (step % 100 == 0) std::printf("step %3d, loss %.3f\n", step, loss.item<double>());
    loss.backward();
    optimizer.step();
  }
  const double right = (model->forward(points).argmax(1) == classes).to(torch::kDouble).mean().item<double>();
  std::printf("%.0f %% right\n", 100 * right);
  return right > 0.95 ? 0 : 1;
}
