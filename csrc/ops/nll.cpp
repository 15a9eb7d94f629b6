// Negative log likelihood over tensors.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "../kernels/class_loss.h"
#include "checks.h"
#include "class_loss.h"
#include "launch.h"
#include "losses.h"
#include "memory.h"

namespace fusedloss::ops {
namespace {

constexpr const char* kName = "nll_loss";
constexpr LossKernels<NllArgs> kKernels = [](const auto& losses) -> const auto& { return losses.nll; };

void check(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, int64_t reduction, bool upcast) {
  check_reduction(kName, reduction);
  check_devices(kName, {{"input", log_probs}, {"target", target}, {"weight", weight}});
  check_class_target(kName, "input", log_probs, target);
  check_floating(kName, "input", log_probs);
  check_weight_type(kName, log_probs, weight, upcast);
  check_class_weight(kName, log_probs, weight);
}

}  // namespace

LossAndDivisor nll(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, int64_t reduction,
                   c10::SymInt ignore_index, bool upcast) {
  check(log_probs, target, weight, reduction, upcast);

  const auto options = log_probs.options().dtype(upcast_type(log_probs.scalar_type(), upcast));
  const bool reduced = reduction != int64_t(Reduction::none);
  Tensor loss = reduced ? at::empty({}, options) : at::empty_symint(position_sizes(log_probs), options);
  Tensor divisor = at::empty({}, log_probs.options().dtype(at::kDouble));

  if (!log_probs.is_meta()) {
    NllArgs args;
    const Tensor input = addressable(log_probs);
    fill_class_views(args.shape, {{input, args.log_probs}});
    const Tensor index = position_view(target, args.target.index);
    args.target.ignore_index = ignore_index.expect_int();
    const Tensor class_weight = accumulate_weight(weight, log_probs.scalar_type());
    args.weight = class_weight.defined() ? class_weight.const_data_ptr() : nullptr;
    set_results(args, loss, divisor, reduction);
    const int64_t invalid = run(kKernels, Pass::forward, args, log_probs);
    if (invalid >= 0) raise_target_out_of_bounds(kName, log_probs, target, invalid);
  }
  return {loss, divisor};
}

Tensor nll_backward(const Tensor& grad_loss, const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                    const Tensor& divisor, int64_t reduction, c10::SymInt ignore_index) {
  const bool upcast = true;  // forward has checked the types, under autocast or not
  check(log_probs, target, weight, reduction, upcast);
  check_flow(kName, log_probs, grad_loss, divisor, reduction, position_sizes(log_probs));

  Tensor grad = with_huge_pages(empty_like_logits(log_probs));
  if (!log_probs.is_meta()) {
    NllArgs args;
    fill_class_views(args.shape, {{grad, args.grad_log_probs}});
    const Tensor index = position_view(target, args.target.index);
    args.target.ignore_index = ignore_index.expect_int();
    const Tensor class_weight = accumulate_weight(weight, log_probs.scalar_type());
    args.weight = class_weight.defined() ? class_weight.const_data_ptr() : nullptr;
    const Tensor flat_grad = position_view(grad_loss, args.flow.grad_loss);
    args.flow.divisor = flow_divisor(divisor, reduction);
    run(kKernels, Pass::backward, args, log_probs);
  }
  return grad;
}

}  // namespace fusedloss::ops
