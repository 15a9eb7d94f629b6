// What the torch::autograd::Functions of all losses share. There are two roads to the gradient:
//
//   NAMEFunction   forward runs the loss, backward runs NAME_backward, which reads the input again
//   NAMEWithGrad   forward runs NAME_with_grad and saves the gradient; backward multiplies it by what forward has not
//                  foreseen of grad_output (csrc/ops/grad_in_forward.h)
//
// In an ordinary backward pass no graph is built, and the operators go straight to their kernels. With
// create_graph=True both roads take NAME_backward through the Autograd key, where csrc/ops/double_backward.cpp
// differentiates it.
//
// What backward needs of forward's statistics are not outputs of a Function: compiled autograd refuses Functions with
// outputs that are not differentiable.

#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "checks.h"
#include "dispatch.h"
#include "grad_in_forward.h"
#include "losses.h"

namespace fusedloss::ops {

using torch::autograd::variable_list;

// Backward runs on threads of autograd's own, which know nothing of the backend that forward had: every Function
// remembers it. A loss has `evaluate`, which is forward, and `gradients`, which is backward: of the first arguments of
// evaluate, which are input and target unless it says how many; the others have none.
template <class Derived>
struct LossFunction : torch::autograd::Function<Derived> {
  static constexpr std::size_t kDifferentiable = 2;
  // Those that a call has: only the last may be absent.
  static std::size_t differentiable(AutogradContext*) { return Derived::kDifferentiable; }

  template <class... Argument>
  static auto forward(AutogradContext* ctx, Argument&&... argument) {
    ctx->saved_data.reserve(4);  // the first of what is kept there: else the table grows step by step
    ctx->saved_data["backend"] = static_cast<int64_t>(current_backend);
    return Derived::evaluate(ctx, std::forward<Argument>(argument)...);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const BackendGuard guard(static_cast<Backend>(ctx->saved_data["backend"].toInt()));
    const NoCalls no_calls;
    variable_list input_grads(argument_count(Derived::evaluate));
    std::array<bool, Derived::kDifferentiable> wanted;
    const std::size_t given = Derived::differentiable(ctx);
    for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] = i < given && ctx->needs_input_grad(i);
    // Absent gradients are undefined tensors, not the operators' empty ones.
    const auto take = [&](auto&&... grad) {
      std::size_t i = 0;
      ((wanted[i] ? void(input_grads[i] = std::move(grad)) : void(), ++i), ...);
    };
    std::apply(take, Derived::gradients(ctx, grads, wanted));
    return input_grads;
  }

 private:
  template <class Result, class... Argument>
  static constexpr std::size_t argument_count(Result (*)(AutogradContext*, Argument...)) {
    return sizeof...(Argument);
  }
};

inline bool wants_grad(const Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); }

inline void check_no_grad(const char* loss, const char* name, OptionalTensor tensor) {
  TORCH_CHECK(!is_present(tensor) || !wants_grad(*tensor), loss, ": ", name,
              " is not differentiable, but requires grad; pass ", name, ".detach()");
}

inline void check_not_overwritten(const char* loss, const Tensor& input) {
  TORCH_CHECK(input.defined(), loss, ": double backward needs the input that inplace=True has overwritten");
}

// Saves tensors, absent ones as undefined, and lists of options for backward, each in one piece: a piece for each
// option is as many entries in a table, which take a tenth of the time of a small loss. Autograd keeps no tensor that
// was made in inference mode, such as a teacher's probabilities: a copy takes its place.
template <class... Options>
void save(AutogradContext* ctx, variable_list tensors, const Options&... options) {
  for (Tensor& tensor : tensors) {
    if (tensor.defined() && tensor.is_inference()) tensor = tensor.clone();
  }
  ctx->save_for_backward(std::move(tensors));
  ((ctx->saved_data[name_of<Options>()] = packed(options)), ...);
}

template <std::size_t kCount>
std::array<Tensor, kCount> saved_tensors(AutogradContext* ctx) {
  variable_list saved = ctx->get_saved_variables();
  std::array<Tensor, kCount> tensors;
  std::move(saved.begin(), saved.end(), tensors.begin());
  return tensors;
}

template <class Options>
Options saved_options(AutogradContext* ctx) {
  return unpacked<Options>(ctx->saved_data.at(name_of<Options>()));
}

}  // namespace fusedloss::ops
