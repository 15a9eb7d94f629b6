// Calls an operator of this library through the dispatcher, from code that sits above the kernels.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "losses.h"

namespace fusedloss::ops {

// Looked up once; ops::NAME gives the signature.
#define FUSEDLOSS_OPERATOR(NAME)                                                                              \
  ([]() -> const auto& {                                                                                      \
    static const auto handle =                                                                                \
        c10::Dispatcher::singleton().findSchemaOrThrow("fusedloss::" #NAME, "").typed<decltype(ops::NAME)>(); \
    return handle;                                                                                            \
  }())

}  // namespace fusedloss::ops
