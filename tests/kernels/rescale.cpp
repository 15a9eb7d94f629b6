// The pass that makes a gradient written for one grad_output a gradient for another.

#include <cmath>

#include "cases.h"
#include "judge.h"
#include "kernels/cuda/cuda.h"

namespace check {
namespace {

struct Factor {
  const char* name;
  double assumed, grad_output;
  bool has_assumed;
};

void run(std::int64_t count, std::int64_t first, Dtype dtype, Dtype flow, const Factor& factor) {
  Random random(count);
  Tensor grad("gradient", dtype, in_a_row(count, first)), output("grad_output", flow, in_a_row(1)),
      assumed("assumed", flow, in_a_row(1));
  for (std::int64_t k = 0; k < count; ++k) grad.set(k, random.bell());
  output.set(0, factor.grad_output);
  assumed.set(0, factor.assumed);
  for (Tensor* tensor : {&grad, &output, &assumed}) {
    tensor->takes_role(Role::input);
    tensor->upload();
  }
  grad.takes_role(Role::in_place);
  fusedloss::cuda::RescaleArgs args;
  args.grad = grad.on_device(first);
  args.dtype = dtype;
  args.numel = count;
  args.grad_output = output.on_device();
  args.grad_output_dtype = flow;
  args.assumed = factor.has_assumed ? assumed.on_device() : nullptr;
  const std::vector<Tensor*> tensors{&grad, &output, &assumed};
  for (int run = 0; run < 2; ++run) {
    for (Tensor* tensor : tensors) tensor->prepare_device(run);
    fusedloss::cuda::rescale(args, nullptr);
    cuda_check(cudaDeviceSynchronize(), "rescale");
    for (Tensor* tensor : tensors) tensor->collect(run, "rescale");
  }
  const double scale = output.of_cpu(0) / (factor.has_assumed ? assumed.of_cpu(0) : 1);
  for (std::int64_t k = 0; k < count; ++k) {
    const double before = grad.of_cpu(k), truth = before * scale, after = grad.of_device(k);
    // The factor is rounded, then the product.
    const double tolerance =
        scale == 1 ? 0 : rounding(dtype, truth) + 2 * unit(accumulate_type(dtype)) * std::fabs(truth);
    EXPECT(std::fabs(after - truth) <= tolerance, "element %ld: %.9g times %.9g gives %.9g", long(k), before, scale,
           after);
  }
}

}  // namespace

void add_rescale(std::vector<Case>& cases, const Selection& selection) {
  static const Factor kFactors[] = {
      {"one", 1, 1, false}, {"as assumed", 0.25, 0.25, true}, {"half", 1, 0.5, false}, {"another", 0.75, 1.25, true}};
  std::vector<std::int64_t> counts{0, 1, 7, 1000};
  if (selection.level == Level::full) counts = {0, 1, 7, 33, 1000, 700001};
  for (const std::int64_t count : counts) {
    for (const std::int64_t first : {0, 1}) {
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64}) {
        for (const Factor& factor : kFactors) {
          const Dtype flow = first == 0 ? accumulate_type(dtype) : dtype;
          cases.push_back({std::string("rescale, ") + name_of(dtype) + ", " + std::to_string(count) + "+" +
                               std::to_string(first) + ", " + factor.name,
                           [=] { run(count, first, dtype, flow, factor); }});
        }
      }
    }
  }
}

}  // namespace check
