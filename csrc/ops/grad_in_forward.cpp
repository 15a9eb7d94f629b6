#include "grad_in_forward.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include "claims.h"
#include "dispatch.h"
#include "huge_pages.h"
#include "losses.h"
#include "overlap.h"

namespace fusedloss::ops {
namespace {

// Whether there is no memory of its own behind a tensor: a subclass that wraps others, a fake, or a batch of vmap.
bool is_wrapper(const Tensor& tensor) { return tensor.key_set().has_any(at::kTensorSubclassLike); }

}  // namespace

bool has_hooks() { return !at::SavedTensorDefaultHooks::get_tls_state().stack.empty(); }

bool is_compiling() {
  using Modes = c10::impl::TorchDispatchModeTLS;
  using Key = c10::impl::TorchDispatchModeKey;
  return Modes::any_modes_set() &&
         (Modes::get_mode(Key::FAKE) || Modes::get_mode(Key::PROXY) || Modes::get_mode(Key::FUNCTIONAL));
}

bool grad_in_forward(const char* loss, const TrainingOptions& training, bool possible, const Tensor& input) {
  const bool plans_memory_itself = is_compiling() || is_wrapper(input);
  const bool suits = input.scalar_type() != at::kHalf || is_present(training.grad_scale);
  const bool is_kept = has_hooks() && !training.inplace;
  const bool result = training.grad_in_forward.value_or(possible && suits && !plans_memory_itself && !is_kept);
  TORCH_CHECK_VALUE(!result || possible, loss,
                    ": grad_in_forward=True needs reduction 'mean' or 'sum', no return_lse or return_entropy, "
                    "and a target that does not require grad");
  TORCH_CHECK_VALUE(!training.inplace || result || plans_memory_itself, loss,
                    ": inplace=True writes the gradient over the input in forward, "
                    "which needs reduction 'mean' or 'sum', no return_lse or return_entropy, a target that does not "
                    "require grad, and for "
                    "float16 grad_scale or grad_in_forward=True");
  return result;
}

GradientInForward::GradientInForward(const char* loss, const Tensor& input, const TrainingOptions& training,
                                     Tensor (*empty_like)(const Tensor&), std::initializer_list<NamedTensor> others)
    : input_(input), overwrites_(training.inplace && !is_compiling() && !is_wrapper(input)) {
  if (is_present(training.grad_scale) || input.scalar_type() == at::kHalf) {
    scale_ = at::empty({}, input.options().dtype(at::kDouble));
  }
  if (!overwrites_) {
    grad_ = with_huge_pages(empty_like(input));
    return;
  }
  const at::TensorBase& base = input.is_view() ? input._base() : input;
  TORCH_CHECK(!input.is_leaf() && !(base.is_leaf() && base.requires_grad()), loss,
              ": inplace=True cannot overwrite an input that is a leaf and requires grad, or a view of one");
  TORCH_CHECK(!input.is_neg(), loss, ": inplace=True cannot overwrite a view that negates what lies in memory");
  for (const auto& [name, tensor] : others) {
    TORCH_CHECK(!tensor || !overlap(input, *tensor), loss, ": inplace=True cannot overwrite an input that overlaps ",
                name, " in memory");
  }
  check_unclaimed(loss, input);
  grad_ = input;
}

std::pair<Tensor, Tensor> GradientInForward::to_save(AutogradContext* ctx) {
  if (overwrites_) {
    grad_ = input_.variable_data();
    ctx->saved_data["claim"] = claim(input_, grad_, has_hooks());
    // A view's place in the graph is the one that it had: its new version would have it looked for behind its base.
    auto* view = torch::autograd::impl::get_view_autograd_meta(input_);
    if (view && view->has_bw_view()) view->set_attr_version(static_cast<uint32_t>(input_._version()));
  }
  if (has_hooks()) ctx->saved_data["hooks"] = true;
  return {grad_, scale_.value_or(Tensor())};
}

Tensor GradientInForward::rescaled(const char* loss, AutogradContext* ctx, const Tensor& grad, const Tensor& scale,
                                   const Tensor& grad_output, bool keep_zeros) {
  const auto claim = ctx->saved_data.find("claim");
  if (claim != ctx->saved_data.end()) check_claim(loss, claim->second.toInt());
  // Else another backward will start from what is saved, or a hook has kept it.
  const bool is_ours_alone =
      !torch::autograd::get_current_graph_task_keep_graph() && ctx->saved_data.find("hooks") == ctx->saved_data.end();
  if (claim != ctx->saved_data.end() && !torch::autograd::get_current_graph_task_keep_graph()) {
    release_claim(claim->second.toInt());
  }
  const bool in_place = is_ours_alone && !is_compiling() && !is_wrapper(grad) && !is_wrapper(grad_output);
  if (!in_place) {
    return Operator<&rescale_grad>::call_below_autograd(grad, grad_output, to_optional(scale), keep_zeros);
  }
  Tensor result = grad;
  Operator<&rescale_grad_>::call_below_autograd(result, grad_output, to_optional(scale), keep_zeros);
  return result;
}

void remember_version(AutogradContext* ctx, const Tensor& input, const std::string& name, const Tensor& other) {
  if (is_compiling() || is_wrapper(input)) return;
  // It shares the version counter of the input, and not its memory, which is freed after backward.
  const Tensor counter = other.defined() ? other.variable_data() : at::empty({0}, input.options());
  torch::autograd::impl::set_version_counter(counter, torch::autograd::impl::version_counter(input));
  ctx->saved_data[name] = counter;
  ctx->saved_data[name + " version"] = static_cast<int64_t>(counter._version());
}

void check_version(const char* loss, AutogradContext* ctx, const std::string& name) {
  const auto counter = ctx->saved_data.find(name);
  TORCH_CHECK(counter == ctx->saved_data.end() ||
                  counter->second.toTensor()._version() == ctx->saved_data[name + " version"].toInt(),
              loss, ": backward needs the ", name, ", which has been modified by an inplace operation");
}

Tensor for_double_backward(AutogradContext* ctx, const Tensor& input, const Tensor& loss) {
  remember_version(ctx, input, "input", loss);
  return ctx->saved_data.find("input") == ctx->saved_data.end() ? input : input.variable_data();
}

Tensor from_forward(const char* loss, AutogradContext* ctx, const Tensor& saved) {
  const auto counter = ctx->saved_data.find("input");
  if (counter == ctx->saved_data.end()) return saved;
  check_version(loss, ctx);
  const Tensor input = saved.variable_data();
  const Tensor& counts = counter->second.toTensor();
  torch::autograd::impl::set_version_counter(input, torch::autograd::impl::version_counter(counts));
  torch::autograd::impl::set_gradient_edge(input, torch::autograd::get_current_node()->next_edge(0));
  return input;
}

}  // namespace fusedloss::ops
