// The backward operators under the Autograd key: with their gradients, which are second derivatives of the losses.

#pragma once

#include <ATen/core/stack.h>

#include <functional>

namespace c10 {
class OperatorHandle;
}

namespace fusedloss::ops {

// A boxed kernel for any of them: it calls the operator below autograd, and saves its arguments.
void backward_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// How autograd's engine is entered within backward. Beside Python it must not be entered with the interpreter's lock,
// which is held where compiled autograd calls backward; csrc/module.cpp sets a function that lets go of it.
using EnterEngine = void (*)(const std::function<void()>& run);
extern EnterEngine enter_engine;

}  // namespace fusedloss::ops
