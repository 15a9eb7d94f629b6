// Negative log likelihood over tensors, and its gradient.

#include <ATen/ops/empty.h>

#include "../kernels/class_loss.h"
#include "autograd.h"
#include "checks.h"
#include "class_views.h"
#include "huge_pages.h"
#include "launch.h"
#include "losses.h"

namespace fusedloss::ops {
namespace {

constexpr const char* kName = "nll_loss";
constexpr LossKernels<NllArgs> kKernels = [](const auto& losses) -> const auto& { return losses.nll; };

void check(const Tensor& log_probs, const Tensor& target, OptionalTensor weight, Reduction reduction, bool upcast) {
  check_reduction(kName, reduction);
  check_devices(kName, {{"input", log_probs}, {"target", target}, {"weight", weight}});
  check_class_target(kName, log_probs, target);
  check_floating(kName, "input", log_probs);
  check_weight_type(kName, log_probs, weight, upcast);
  check_class_weight(kName, log_probs, weight);
}

// Runs a pass, of whose arguments those are missing that every pass has.
int64_t run_on_targets(Pass pass, NllArgs& args, const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                       const Nll::Options& options) {
  const Tensor index = position_view(target, args.target.index);
  const Tensor flat_weight = weight_view(weight, log_probs.scalar_type(), args.weight);
  args.target.ignore_index = options.ignore_index.expect_int();
  return run(kKernels, pass, args, log_probs);
}

struct NllFunction : LossFunction<NllFunction> {
  static Tensor evaluate(AutogradContext* ctx, const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                         const Nll::Options& options, const Nll::Training& training, LossAndDivisor* outputs) {
    *outputs = Operator<&Nll::forward>::call_below_autograd(log_probs, target, weight, options, training);
    const auto& [loss, divisor] = *outputs;
    save(ctx, {log_probs, target, weight.value_or(Tensor()), divisor}, options);
    return loss;
  }

  static TwoGrads gradients(AutogradContext* ctx, const variable_list& grads, const std::array<bool, 2>& wanted) {
    const auto [log_probs, target, weight, divisor] = saved_tensors<4>(ctx);
    return {Operator<&Nll::backward>::call_in_backward(grads[0], log_probs, target, to_optional(weight), divisor,
                                                       saved_options<Nll::Options>(ctx)),
            Tensor()};
  }
};

}  // namespace

LossAndDivisor Nll::forward(const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                            const Options& options, const Training& training) {
  check(log_probs, target, weight, options.reduction, training.upcast);

  const auto loss_options = log_probs.options().dtype(upcast_type(log_probs.scalar_type(), training.upcast));
  const bool reduced = options.reduction != Reduction::none;
  Tensor loss = reduced ? at::empty({}, loss_options) : at::empty_symint(position_sizes(log_probs), loss_options);
  Tensor divisor = at::empty({}, log_probs.options().dtype(at::kDouble));

  if (!log_probs.is_meta()) {
    NllArgs args;
    const Tensor input = addressable(log_probs);
    fill_class_views(args.shape, {{input, args.log_probs}});
    set_results(args, loss, divisor, options.reduction);
    const int64_t invalid = run_on_targets(Pass::forward, args, log_probs, target, weight, options);
    check_in_bounds(kName, log_probs.size(class_dim(log_probs)), target, invalid);
  }
  return {loss, divisor};
}

Tensor Nll::backward(const Tensor& grad_loss, const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                     const Tensor& divisor, const Options& options) {
  const bool upcast = true;  // forward has checked the types, under autocast or not
  check(log_probs, target, weight, options.reduction, upcast);
  check_grad_loss(kName, log_probs, grad_loss, divisor, options.reduction, position_sizes(log_probs));

  Tensor grad = with_huge_pages(empty_like_logits(log_probs));
  if (!log_probs.is_meta()) {
    NllArgs args;
    fill_class_views(args.shape, {{grad, args.grad_log_probs}});
    const Tensor flat_grad = position_view(grad_loss, args.grad_loss);
    args.grad_divisor = grad_divisor(divisor, options.reduction);
    run_on_targets(Pass::backward, args, log_probs, target, weight, options);
  }
  return grad;
}

LossAndDivisor Nll::autograd(const Tensor& log_probs, const Tensor& target, OptionalTensor weight,
                             const Options& options, const Training& training) {
  check_dense(kName, {{"input", log_probs}, {"target", target}, {"weight", weight}});
  check_no_grad(kName, "weight", weight);
  if (!wants_grad(log_probs)) {
    return Operator<&Nll::forward>::call_below_autograd(log_probs, target, weight, options, training);
  }
  LossAndDivisor outputs;
  std::get<0>(outputs) = NllFunction::apply(log_probs, target, weight, options, training, &outputs);
  return outputs;
}

}  // namespace fusedloss::ops
