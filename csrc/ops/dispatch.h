// Calls an operator of the current backend's namespace through the dispatcher, from code that sits above the kernels.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <string>

#include "backend.h"
#include "losses.h"

namespace fusedloss::ops {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(Backend backend, const char* name) {
  const std::string qualified = std::string(namespace_of(backend)) + "::" + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(qualified.c_str(), "").typed<Signature>();
}

// Looked up once; ops::NAME gives the signature.
#define FUSEDLOSS_OPERATOR(NAME)                                                             \
  ([]() -> const auto& {                                                                     \
    static const std::array handles{                                                         \
        ::fusedloss::ops::find_operator<decltype(ops::NAME)>(ops::Backend::compiled, #NAME), \
        ::fusedloss::ops::find_operator<decltype(ops::NAME)>(ops::Backend::triton, #NAME),   \
    };                                                                                       \
    return handles[static_cast<size_t>(ops::current_backend())];                             \
  }())

}  // namespace fusedloss::ops
