// The backward operators under the Autograd key: with their gradients, which are second derivatives of the losses.

#pragma once

#include <ATen/core/stack.h>

namespace c10 {
class OperatorHandle;
}

namespace fusedloss::autograd {

// A boxed kernel for any of them: it calls the operator below autograd, and saves its arguments.
void backward_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace fusedloss::autograd
