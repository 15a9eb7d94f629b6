// The gradient that forward writes: when it does, where, and what backward makes of it.
//
// Every choice is made once, in forward, from what belongs to the call: its arguments, and whether a compiler traces
// it. A mode that happens to be active (a counter of FLOPs, a user's logger) must not decide: backward, or a
// recomputation of forward, may run under another.

#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <utility>

#include "checks.h"
#include "options.h"

namespace fusedloss::ops {

using torch::autograd::AutogradContext;

// Whether a compiler traces what is called.
bool is_compiling();

// Whether forward is to write the gradient. `possible`: the loss is reduced and nothing but the input wants a gradient.
// Unless it is asked for:
// - float16 needs a grad_scale: an unscaled gradient underflows before a GradScaler's factor reaches it;
// - not where a compiler traces, which fuses the multiplication by an unknown grad_output better into a backward apart;
// - not where hooks take what is saved: a checkpoint would throw the gradient away and write it again, others keep it,
//   so that backward could not multiply it where it is.
bool grad_in_forward(const char* loss, const TrainingOptions& training, bool possible, const Tensor& input);

class GradientInForward {
 public:
  // Where forward writes the gradient: over the input, or into a tensor like it. others: what must not be overwritten.
  GradientInForward(const char* loss, const Tensor& input, const TrainingOptions& training,
                    Tensor (*empty_like)(const Tensor&), std::initializer_list<NamedTensor> others);

  bool overwrites() const { return overwrites_; }
  Tensor& grad() { return grad_; }
  const std::optional<Tensor>& scale() const { return scale_; }

  // What backward needs, once the gradient is there: the gradient and its scale, to be saved.
  std::pair<Tensor, Tensor> to_save(AutogradContext* ctx);

  // In backward: the gradient for this grad_output.
  static Tensor rescaled(const char* loss, AutogradContext* ctx, const Tensor& grad, const Tensor& scale,
                         const Tensor& grad_output, bool keep_zeros);

 private:
  const Tensor& input_;
  bool overwrites_;
  Tensor grad_;
  std::optional<Tensor> scale_;
};

// Whether what is saved passes through hooks, which may keep it.
bool has_hooks();

// Remembers the version of an input that is saved: autograd itself does not look at it where hooks have been. other: a
// small tensor of the same device, which saves the time to make one.
void remember_version(AutogradContext* ctx, const Tensor& input, const std::string& name = "input",
                      const Tensor& other = {});
// In backward: raises if the input has been written to since then.
void check_version(const char* loss, AutogradContext* ctx, const std::string& name = "input");

// An input that double backward alone needs, as a tensor to be saved. Unlike one that is saved as it is, it may be
// changed after forward, as with native torch, whose backward needs it neither; double backward then raises.
Tensor for_double_backward(AutogradContext* ctx, const Tensor& input, const Tensor& loss);
// In backward: the same, in the place that the input has in the graph, and with its version counter.
Tensor from_forward(const char* loss, AutogradContext* ctx, const Tensor& saved);

}  // namespace fusedloss::ops
