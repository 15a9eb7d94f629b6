// One launch of a pass whose bytes an emulator counts: everything lies in one piece, one position in four is ignored
// where `ignored` is set, the reduction is the mean.

#pragma once

#include "element_cases.h"

enum class Measured { rows, columns, nll, bce_with_logits, bce };

inline void measure(Measured what, Pass pass, Dtype dtype, std::int64_t classes, std::int64_t positions, bool ignored) {
  const bool columns = what == Measured::columns;
  const std::int64_t count = classes * positions;
  Buffer input(dtype, count), grad(dtype, count), total(dtype, 1), divisor(Dtype::float64, 1);
  for (std::int64_t i = 0; i < count; ++i) input.set(i, double(i % 7) / 8);
  input.upload();
  divisor.set(0, double(positions));
  divisor.upload();
  const fusedloss::Total wanted{Reduction::mean, total.data(true), dtype, static_cast<double*>(divisor.data(true))};
  const bool backward = pass == Pass::backward, forward = pass == Pass::forward;
  if (what == Measured::bce || what == Measured::bce_with_logits) {
    ElementwiseArgs args;
    args.shape = {1, count, {count}};
    args.dtype = dtype;
    args.input = {input.data(true), dtype, true, {1}};
    Buffer target(dtype, count);
    for (std::int64_t i = 0; i < count; ++i) target.set(i, double(i % 2));
    target.upload();
    args.target = {target.data(true), dtype, true, {1}};
    if (!backward) args.total = wanted;
    if (!forward) args.grad_input = {grad.data(true), dtype, true, {1}};
    const auto& kernels = fusedloss::cuda::kKernels;
    launch(what == Measured::bce ? kernels.bce : kernels.bce_with_logits, args, pass);
    return;
  }
  const fusedloss::ClassShape shape{1, classes, positions};
  const std::int64_t class_stride = columns ? positions : 1, inner_stride = columns ? 1 : classes;
  Buffer index(Dtype::int64, positions), max(accumulate_type(dtype), positions);
  Buffer log_sum(accumulate_type(dtype), positions);
  for (std::int64_t i = 0; i < positions; ++i) {
    index.set(i, ignored && i % 4 == 3 ? -100 : double(i % classes));
    max.set(i, 0.75);
    log_sum.set(i, 1);
  }
  index.upload();
  max.upload();
  log_sum.upload();
  const fusedloss::ClassTensor in{input.data(true), dtype, 0, class_stride, inner_stride};
  const fusedloss::ClassTensor out{forward ? nullptr : grad.data(true), dtype, 0, class_stride, inner_stride};
  const fusedloss::ClassTarget target{{index.data(true), Dtype::int64, 1}, -100};
  if (what == Measured::nll) {
    NllArgs args;
    args.shape = shape;
    args.log_probs = in;
    args.target = target;
    if (!backward) args.total = wanted;
    args.grad_log_probs = out;
    return launch(fusedloss::cuda::kKernels.nll, args, pass);
  }
  CrossEntropyArgs args;
  args.shape = shape;
  args.logits = in;
  args.target = target;
  args.grad_logits = out;
  if (!backward) args.total = wanted;
  if (pass != Pass::forward_with_gradient) {
    args.row_max = max.data(true);
    args.row_log_sum = log_sum.data(true);
  }
  launch(fusedloss::cuda::kKernels.cross_entropy, args, pass);
}
