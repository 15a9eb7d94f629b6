// The options of the operators. Each is listed here and nowhere else in C++, as a field and by the words that schemas
// have for it; those of a formula stand in csrc/math. From these lists come the schemas (csrc/register.cpp), the flat
// argument lists that the dispatcher knows (csrc/ops/dispatch.h) and what autograd saves (csrc/ops/autograd.h).

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../kernels/types.h"
#include "../math/cross_entropy.h"

namespace fusedloss::ops {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;
using OptionalIndex = std::optional<c10::SymInt>;  // symbolic where a compiler traces a value that varies
using OptionalBool = std::optional<bool>;

// A field, and how schemas speak of it: "bool upcast=False".
template <class Options, class Field>
struct Option {
  const char* type;
  const char* name;
  Field Options::* field;
  const char* default_value = "";

  std::string words() const { return std::string(type) + ' ' + name + default_value; }
};
template <class Options, class Field, class... Default>
Option(const char*, const char*, Field Options::*, Default...) -> Option<Options, Field>;

// Those of the formula are the base's fields, which kernels are handed.
struct CrossEntropyOptions : math::RowOptions {
  Reduction reduction = Reduction::mean;
  c10::SymInt ignore_index = -100;

  static constexpr auto kOptions = std::apply(
      [](const auto&... of_formula) {
        return std::tuple{Option{"int", "reduction", &CrossEntropyOptions::reduction},
                          Option{"SymInt", "ignore_index", &CrossEntropyOptions::ignore_index},
                          Option{"float", of_formula.first, of_formula.second}...};
      },
      math::RowOptions::named());
};

// What cross entropy weighs classes and positions with, and divides its mean by.
struct CrossEntropyWeights {
  std::optional<Tensor> weight;         // (C)
  std::optional<Tensor> sample_weight;  // of the positions' shape
  std::optional<Tensor> denominator;    // one number; absent: what counts

  static constexpr std::tuple kOptions{Option{"Tensor?", "weight", &CrossEntropyWeights::weight},
                                       Option{"Tensor?", "sample_weight", &CrossEntropyWeights::sample_weight},
                                       Option{"Tensor?", "denominator", &CrossEntropyWeights::denominator}};
};

// Which classes a rank holds, where a process group shares them: those from first_class on, of num_classes.
struct ClassShard {
  c10::SymInt first_class = 0;
  c10::SymInt num_classes = 0;

  static constexpr std::tuple kOptions{Option{"SymInt", "first_class", &ClassShard::first_class},
                                       Option{"SymInt", "num_classes", &ClassShard::num_classes}};
};

// The statistics of whole rows, merged from those of the ranks, and the divisor of a mean.
struct MergedRows {
  std::optional<Tensor> row_max;
  std::optional<Tensor> row_log_sum;
  std::optional<Tensor> row_gap;  // beside an entropy
  std::optional<Tensor> row_mass;
  std::optional<Tensor> divisor;

  static constexpr std::tuple kOptions{
      Option{"Tensor?", "row_max", &MergedRows::row_max}, Option{"Tensor?", "row_log_sum", &MergedRows::row_log_sum},
      Option{"Tensor?", "row_gap", &MergedRows::row_gap}, Option{"Tensor?", "row_mass", &MergedRows::row_mass},
      Option{"Tensor?", "divisor", &MergedRows::divisor}};
};

// What is returned of every position, ignored or not, beside the loss.
struct CrossEntropyAnswers {
  bool lse = false;
  bool entropy = false;
  bool argmax = false;

  bool any() const { return lse || entropy || argmax; }
  bool differentiable() const { return lse || entropy; }

  static constexpr std::tuple kOptions{Option{"bool", "return_lse", &CrossEntropyAnswers::lse, "=False"},
                                       Option{"bool", "return_entropy", &CrossEntropyAnswers::entropy, "=False"},
                                       Option{"bool", "return_argmax", &CrossEntropyAnswers::argmax, "=False"}};
};

struct ElementwiseOptions {
  Reduction reduction = Reduction::mean;
  OptionalIndex ignore_index;

  static constexpr std::tuple kOptions{Option{"int", "reduction", &ElementwiseOptions::reduction},
                                       Option{"SymInt?", "ignore_index", &ElementwiseOptions::ignore_index}};
};

// What the losses of one element are weighted with. Each broadcasts to the input's shape.
struct ElementwiseWeights {
  std::optional<Tensor> weight;
  std::optional<Tensor> pos_weight;

  static constexpr std::tuple kOptions{Option{"Tensor?", "weight", &ElementwiseWeights::weight},
                                       Option{"Tensor?", "pos_weight", &ElementwiseWeights::pos_weight}};
};

// What a caller may ask of a forward operator beside the loss. All but upcast and statistics concern autograd alone:
// below it, a forward operator only reads.
struct TrainingOptions {
  // Treat half precision as float32 when the result's type is decided: what native torch gives under autocast.
  bool upcast = false;
  // Write the gradient in forward: true, false, or absent: where grad_in_forward.h allows it.
  OptionalBool grad_in_forward;
  // One number, the grad_output that backward is expected to be called with; absent: 1.
  std::optional<Tensor> grad_scale;
  // The gradient may be written over the input.
  bool inplace = false;
  // Return what the backward operator needs; else these outputs are undefined, as they are where the gradient was
  // written in forward. Compilers get them always: they take no undefined outputs.
  bool statistics = false;

  static constexpr std::tuple kOptions{Option{"bool", "upcast", &TrainingOptions::upcast, "=False"},
                                       Option{"bool?", "grad_in_forward", &TrainingOptions::grad_in_forward, "=None"},
                                       Option{"Tensor?", "grad_scale", &TrainingOptions::grad_scale, "=None"},
                                       Option{"bool", "inplace", &TrainingOptions::inplace, "=False"},
                                       Option{"bool", "statistics", &TrainingOptions::statistics, "=False"}};
};

// What a loss that makes its logits in a linear layer is told about that layer's products.
struct LinearOptions {
  // Treat half precision as float32 when the loss's type is decided, as autocast does.
  bool upcast = false;
  // The type that the products' operands are cast to, but for float64 ones: autocast's; absent: they have one type.
  std::optional<at::ScalarType> product_type;
  // Bytes of scratch that are allowed, and rows of logits to make at a time; absent: what is best (linear_plan.h).
  std::optional<int64_t> memory;
  std::optional<int64_t> chunk;
  // Whether rows without a target that counts are left out of the products, which a device makes the host wait for;
  // absent: on the CPU.
  OptionalBool skip_ignored;
  // Whether forward makes the gradients, where it can; absent: where nothing speaks against it.
  OptionalBool grad_in_forward;
  // Return what the backward operator needs, as for cross entropy.
  bool statistics = false;

  static constexpr std::tuple kOptions{Option{"bool", "upcast", &LinearOptions::upcast, "=False"},
                                       Option{"ScalarType?", "product_type", &LinearOptions::product_type, "=None"},
                                       Option{"int?", "memory", &LinearOptions::memory, "=None"},
                                       Option{"int?", "chunk", &LinearOptions::chunk, "=None"},
                                       Option{"bool?", "skip_ignored", &LinearOptions::skip_ignored, "=None"},
                                       Option{"bool?", "grad_in_forward", &LinearOptions::grad_in_forward, "=None"},
                                       Option{"bool", "statistics", &LinearOptions::statistics, "=False"}};
};

// The first options of a list, for losses that do not have them all.
template <std::size_t kCount, class Options>
struct First : Options {
  First() = default;
  First(Options options) : Options(std::move(options)) {}

  static constexpr auto kOptions = []<std::size_t... I>(std::index_sequence<I...>) {
    return std::tuple{std::get<I>(Options::kOptions)...};
  }(std::make_index_sequence<kCount>());
};

template <class Options, class Call>
void for_each_option(Call call) {
  std::apply([&](const auto&... option) { (call(option), ...); }, Options::kOptions);
}

// The type that a field has among an operator's arguments.
template <class Field>
using ArgumentOf =
    std::conditional_t<std::is_same_v<Field, Reduction>, int64_t,
                       std::conditional_t<std::is_same_v<Field, std::optional<Tensor>>, OptionalTensor, Field>>;

// A list of options in one piece, under the name of its first; and back.
template <class Options>
const char* name_of() {
  return std::get<0>(Options::kOptions).name;
}

template <class Options>
c10::IValue packed(const Options& options) {
  std::vector<c10::IValue> values;
  values.reserve(std::tuple_size_v<decltype(Options::kOptions)>);
  for_each_option<Options>([&]<class Owner, class Field>(const Option<Owner, Field>& option) {
    values.emplace_back(static_cast<ArgumentOf<Field>>(options.*option.field));
  });
  return c10::ivalue::Tuple::create(std::move(values));
}

template <class Options>
Options unpacked(const c10::IValue& values) {
  Options options;
  auto value = values.toTupleRef().elements().begin();
  for_each_option<Options>([&]<class Owner, class Field>(const Option<Owner, Field>& option) {
    options.*option.field = static_cast<Field>((value++)->template to<ArgumentOf<Field>>());
  });
  return options;
}

// From IValues by their names.
template <class Options, class Values>
Options options_in(const Values& values) {
  Options options;
  for_each_option<Options>([&]<class Owner, class Field>(const Option<Owner, Field>& option) {
    options.*option.field = static_cast<Field>(values.at(option.name).template to<ArgumentOf<Field>>());
  });
  return options;
}

}  // namespace fusedloss::ops
