// Functions as operators, and operators as functions. The dispatcher knows flat lists of arguments alone: where a
// function has a list of options (csrc/ops/options.h), its operator has an argument for each of them.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <array>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "backend.h"
#include "calls.h"
#include "options.h"

namespace fusedloss::ops {

// A parameter of a function, as arguments of its operator: most are one.
template <class Parameter>
struct Flat {
  using Arguments = std::tuple<Parameter>;

  static std::tuple<Parameter&&> flatten(Parameter& parameter) { return {static_cast<Parameter&&>(parameter)}; }

  // Back from all arguments of the operator, of which the parameter has those from kFirst on.
  template <std::size_t kFirst, class All>
  static Parameter&& collect(All&& all) {
    return std::get<kFirst>(std::move(all));
  }
};

// A list of options is an argument for each of them.
template <class Options>
  requires requires { Options::kOptions; }
struct Flat<const Options&> {
  static auto flatten(const Options& options) {
    return std::apply(
        [&]<class... Owner, class... Field>(const Option<Owner, Field>&... option) {
          return std::tuple<ArgumentOf<Field>...>(static_cast<ArgumentOf<Field>>(options.*option.field)...);
        },
        Options::kOptions);
  }
  using Arguments = decltype(flatten(std::declval<Options>()));

  template <std::size_t kFirst, class All>
  static Options collect(All&& all) {
    Options options;
    const auto set = []<class Field>(Field& field, auto&& argument) {
      field = static_cast<Field>(std::forward<decltype(argument)>(argument));
    };
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (set(options.*std::get<I>(Options::kOptions).field, std::get<kFirst + I>(std::move(all))), ...);
    }(std::make_index_sequence<std::tuple_size_v<Arguments>>());
    return options;
  }
};

template <class Function>
struct FlatArguments;
template <class Result, class... Parameter>
struct FlatArguments<Result(Parameter...)> {
  using Type = decltype(std::tuple_cat(std::declval<typename Flat<Parameter>::Arguments>()...));
};

// A function as an operator of both backends' namespaces.
template <auto kFunction, class Function = std::remove_pointer_t<decltype(kFunction)>,
          class Arguments = typename FlatArguments<Function>::Type>
struct Operator;

template <auto kFunction, class Result, class... Parameter, class... Argument>
struct Operator<kFunction, Result(Parameter...), std::tuple<Argument...>> {
  // What csrc/register.cpp has defined for the function, by backend.
  static inline std::array<std::optional<c10::TypedOperatorHandle<Result(Argument...)>>, 2> handles;

  static void find(Backend backend, const std::string& name) {
    const std::string qualified = (backend == Backend::triton ? "fusedloss_triton::" : "fusedloss::") + name;
    handle(backend) =
        c10::Dispatcher::singleton().findSchemaOrThrow(qualified.c_str(), "").typed<Result(Argument...)>();
  }
  static auto& handle(Backend backend) { return handles[static_cast<std::size_t>(backend)]; }

  // As C++ code calls it: with the operator's arguments, through the dispatcher.
  template <Backend kBackend>
  static Result called(Argument... argument) {
    return handle(kBackend)->call(std::forward<Argument>(argument)...);
  }

  // Through the dispatcher, in the namespace of the current backend.
  static Result call(Parameter... parameter) {
    return std::apply(
        [](auto&&... argument) -> Result {
          return handle(current_backend)->call(std::forward<decltype(argument)>(argument)...);
        },
        std::tuple_cat(Flat<Parameter>::flatten(parameter)...));
  }

  // Where nobody differentiates the result.
  static Result call_below_autograd(Parameter... parameter) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call(static_cast<Parameter&&>(parameter)...);
  }

  // In a backward pass, which somebody differentiates under create_graph=True alone.
  static Result call_in_backward(Parameter... parameter) {
    return (at::GradMode::is_enabled() ? call : call_below_autograd)(static_cast<Parameter&&>(parameter)...);
  }

  // What the dispatcher is to call for a backend.
  template <Backend kBackend>
  static Result under(Argument... argument) {
    const BackendGuard guard(kBackend);
    return [&]<std::size_t... I>(std::tuple<Argument&&...> all, std::index_sequence<I...>) -> Result {
      return kFunction(Flat<Parameter>::template collect<first_argument(I)>(std::move(all))...);
    }({static_cast<Argument&&>(argument)...}, std::index_sequence_for<Parameter...>());
  }

  // The same, of a loss whose calls are counted, unless they raise.
  template <Backend kBackend>
  static Result counted(Argument... argument) {
    static Calls& calls = Calls::of_operator(handle(kBackend)->operator_name().name);
    const at::Tensor& input = std::get<0>(std::tie(argument...));
    Result result = under<kBackend>(static_cast<Argument&&>(argument)...);
    count_call(calls, kBackend, input);
    return result;
  }

 private:
  static constexpr std::size_t first_argument(std::size_t parameter) {
    constexpr std::array counts{std::tuple_size_v<typename Flat<Parameter>::Arguments>...};
    return std::accumulate(counts.begin(), counts.begin() + parameter, std::size_t{0});
  }
};

}  // namespace fusedloss::ops
