// The forward operators under the Autocast keys. Native torch casts the logits to float32 first, a copy forward and
// another backward; these read half precision as it is and return the float32 loss that native returns.

#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <concepts>

#include "dispatch.h"
#include "losses.h"

namespace fusedloss::ops {

template <class Argument>
const Argument& with_upcast(const Argument& argument) {
  return argument;
}
template <std::derived_from<TrainingOptions> Training>
Training with_upcast(const Training& asked) {
  Training training = asked;
  training.upcast = true;
  return training;
}

template <class Loss, class Function = decltype(Loss::forward)>
struct Autocast;

template <class Loss, class Result, class... Parameter>
struct Autocast<Loss, Result(const Tensor&, Parameter...)> {
  static Result call(const Tensor& input, Parameter... parameter) {
    if constexpr (requires { &Loss::autocast; }) return Loss::autocast(input, parameter...);
    if constexpr (requires { Loss::check_autocast(input); }) Loss::check_autocast(input);
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return Operator<&Loss::forward>::call(input, with_upcast(parameter)...);
  }
};

}  // namespace fusedloss::ops
