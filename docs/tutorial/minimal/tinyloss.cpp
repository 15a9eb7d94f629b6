// Mean cross entropy of (N, C) float32 logits against N class indices, and its gradient. For the CPU.
#include <torch/extension.h>

#include <algorithm>
#include <cmath>

static float log_sum_exp(const float* x, int64_t classes) {
  const float max = *std::max_element(x, x + classes);  // subtracted first, or exp overflows
  float sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += std::exp(x[c] - max);
  return max + std::log(sum);
}

static void check(const at::Tensor& x, const at::Tensor& target) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 2 && x.size(1) > 0,
              "logits must be (N, C) float32 on the CPU, got ", x.toString(), " ", x.sizes());
  TORCH_CHECK(target.is_cpu() && target.scalar_type() == at::kLong && target.dim() == 1 && target.size(0) == x.size(0),
              "target must be (N) int64 on the CPU, got ", target.toString(), " ", target.sizes());
}

static at::Tensor forward(at::Tensor logits, at::Tensor target) {
  check(logits, target);
  logits = logits.contiguous(), target = target.contiguous();  // data_ptr knows nothing of strides
  const auto [rows, classes] = std::pair(logits.size(0), logits.size(1));
  double sum = 0;
  for (int64_t n = 0; n < rows; ++n) {
    const float* x = logits.data_ptr<float>() + n * classes;
    const int64_t t = target.data_ptr<int64_t>()[n];
    TORCH_CHECK_INDEX(t >= 0 && t < classes, "target ", t, " is outside [0, ", classes, ")");
    sum += log_sum_exp(x, classes) - x[t];
  }
  return at::scalar_tensor(sum / rows, logits.options());
}

static at::Tensor backward(at::Tensor grad_output, at::Tensor logits, at::Tensor target) {
  logits = logits.contiguous(), target = target.contiguous();
  at::Tensor grad = at::empty_like(logits);
  const auto [rows, classes] = std::pair(logits.size(0), logits.size(1));
  const float scale = grad_output.item<float>() / rows;
  for (int64_t n = 0; n < rows; ++n) {
    const float* x = logits.data_ptr<float>() + n * classes;
    float* g = grad.data_ptr<float>() + n * classes;
    const float lse = log_sum_exp(x, classes);
    for (int64_t c = 0; c < classes; ++c) g[c] = std::exp(x[c] - lse) * scale;
    g[target.data_ptr<int64_t>()[n]] -= scale;
  }
  return grad;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("forward", &forward).def("backward", &backward); }
