// The bridge to the Triton kernels, which are Python (fusedloss/triton). They are handed what the CUDA kernels are
// handed: the structs of csrc/kernels, as the NamedTuples of fusedloss/triton/arguments.py, field by field and by the
// same names. A pointer becomes a tensor of one element, since Triton takes an address and a type from a tensor; what
// is absent becomes None.

#include "triton.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>

#include "ops/launch.h"

namespace fusedloss {
namespace {

using namespace py::literals;

at::ScalarType scalar_type(Dtype dtype) { return ops::kScalarTypes[static_cast<std::size_t>(dtype)]; }

// By the values of the enumerations of csrc/kernels/types.h.
constexpr const char* kPasses[] = {"forward", "forward_with_gradient", "backward"};
constexpr const char* kReductions[] = {"none", "mean", "sum"};

template <std::size_t kSize>
struct Name {
  consteval Name(const char (&literal)[kSize]) { std::copy_n(literal, kSize, text); }
  char text[kSize];
};

// What fusedloss/triton/arguments.py has by a name; looked up once.
template <Name kName>
py::handle named() {
  static const py::handle found =
      py::object(py::module_::import("fusedloss.triton.arguments").attr(kName.text)).release();
  return found;
}

class ToPython {
 public:
  // dtype: of the input, which decides the accumulate type.
  ToPython(const at::Tensor& input, Dtype dtype)
      : device_(input.device()), accumulate_(ops::accumulate_type(scalar_type(dtype))) {}

  py::object operator()(const CrossEntropyArgs& a) const {
    return named<"CrossEntropyArgs">()(
        "device"_a = device_, "shape"_a = shape(a.shape), "logits"_a = input(a.logits), "first_class"_a = a.first_class,
        "all_classes"_a = a.all_classes, "has_probabilities"_a = a.has_probabilities,
        "target"_a = a.has_probabilities ? py::none() : target(a.target), "probabilities"_a = tensor(a.probabilities),
        "weight"_a = sums(a.weight), "sample_weight"_a = tensor(a.sample_weight), "options"_a = options(a),
        "every_row"_a = a.every_row, "row_max"_a = sums(a.row_max), "row_log_sum"_a = sums(a.row_log_sum),
        "row_gap"_a = sums(a.row_gap), "row_mass"_a = sums(a.row_mass), "loss"_a = tensor(a.loss),
        "lse"_a = sums(a.lse), "entropy"_a = sums(a.entropy), "argmax"_a = pointer(a.argmax, at::kLong),
        "total"_a = total(a.total), "grad_loss"_a = tensor(a.grad_loss), "grad_divisor"_a = float64(a.grad_divisor),
        "grad_lse"_a = sums(a.grad_lse), "grad_entropy"_a = sums(a.grad_entropy),
        "grad_logits"_a = tensor(a.grad_logits), "grad_probabilities"_a = tensor(a.grad_probabilities));
  }

  py::object operator()(const NllArgs& a) const {
    return named<"NllArgs">()("device"_a = device_, "shape"_a = shape(a.shape), "log_probs"_a = input(a.log_probs),
                              "target"_a = target(a.target), "weight"_a = sums(a.weight), "loss"_a = tensor(a.loss),
                              "total"_a = total(a.total), "grad_loss"_a = tensor(a.grad_loss),
                              "grad_divisor"_a = float64(a.grad_divisor),
                              "grad_log_probs"_a = tensor(a.grad_log_probs));
  }

  py::object operator()(const ElementwiseArgs& a) const {
    const auto numbers = [&](const std::array<std::int64_t, kMaxDims>& values) {
      py::tuple tuple(a.shape.dims);
      for (int d = 0; d < a.shape.dims; ++d) tuple[d] = values[d];
      return tuple;
    };
    const auto given = [&](const ElementwiseTensor& t, const py::object& data) {
      return named<"ElementwiseTensor">()("data"_a = data, "linear"_a = t.linear, "strides"_a = numbers(t.strides));
    };
    const auto input = [&](const ElementwiseTensor& t) { return given(t, present(t.data, t.dtype)); };
    const auto tensor = [&](const ElementwiseTensor& t) { return t.data ? input(t) : py::none(); };
    return named<"ElementwiseArgs">()(
        "device"_a = device_,
        "shape"_a = named<"ElementwiseShape">()("numel"_a = a.shape.numel, "sizes"_a = numbers(a.shape.sizes)),
        "input"_a = input(a.input), "target"_a = input(a.target), "weight"_a = tensor(a.weight),
        "pos_weight"_a = tensor(a.pos_weight), "has_ignore_index"_a = a.has_ignore_index,
        "ignore_index"_a = a.ignore_index, "loss"_a = tensor(a.loss), "total"_a = total(a.total),
        "grad_loss"_a = tensor(a.grad_loss), "grad_divisor"_a = float64(a.grad_divisor),
        "grad_input"_a = tensor(a.grad_input), "grad_target"_a = tensor(a.grad_target));
  }

  py::object operator()(const cuda::RescaleArgs& a) const {
    return named<"RescaleArgs">()("device"_a = device_, "grad"_a = pointer(a.grad, scalar_type(a.dtype)),
                                  "numel"_a = a.numel,
                                  "grad_output"_a = pointer(a.grad_output, scalar_type(a.grad_output_dtype)),
                                  "scale"_a = float64(a.scale), "keep_zeros"_a = a.keep_zeros);
  }

 private:
  py::object pointer(const void* data, at::ScalarType type) const {
    if (!data) return py::none();
    // With the device named, nobody asks the driver whose memory it is.
    return py::cast(at::for_blob(const_cast<void*>(data), {1})
                        .options(at::TensorOptions(type).device(device_))
                        .target_device(device_)
                        .make_tensor());
  }
  // An empty tensor's data is null, and it is not absent.
  py::object present(const void* data, Dtype dtype) const {
    if (data) return pointer(data, scalar_type(dtype));
    return py::cast(at::empty({0}, at::TensorOptions(scalar_type(dtype)).device(device_)));
  }
  py::object sums(const void* data) const { return pointer(data, accumulate_); }
  py::object float64(const double* data) const { return pointer(data, at::kDouble); }

  static py::object options(const math::RowOptions& o) {
    py::dict fields;
    for (const auto& [name, field] : o.named()) fields[name] = o.*field;
    return named<"RowOptions">()(**fields);
  }
  static py::object shape(const ClassShape& s) {
    return named<"ClassShape">()("outer"_a = s.outer, "classes"_a = s.classes, "inner"_a = s.inner);
  }
  py::object input(const ClassTensor& t) const {
    return named<"ClassTensor">()("data"_a = present(t.data, t.dtype), "outer_stride"_a = t.outer_stride,
                                  "class_stride"_a = t.class_stride, "inner_stride"_a = t.inner_stride);
  }
  py::object input(const PositionTensor& t) const {
    return named<"PositionTensor">()("data"_a = present(t.data, t.dtype), "stride"_a = t.stride);
  }
  template <class Tensor>
  py::object tensor(const Tensor& t) const {
    return t.data ? input(t) : py::none();
  }
  py::object target(const ClassTarget& t) const {
    return named<"ClassTarget">()("index"_a = input(t.index), "ignore_index"_a = t.ignore_index);
  }
  py::object total(const Total& t) const {
    return named<"Total">()("reduction"_a = named<"Reduction">().attr(kReductions[static_cast<int>(t.reduction)]),
                            "loss"_a = pointer(t.loss, scalar_type(t.dtype)), "divisor"_a = float64(t.divisor),
                            "denominator"_a = float64(t.denominator));
  }

  const at::Device device_;
  const at::ScalarType accumulate_;
};

Dtype dtype_of(const CrossEntropyArgs& args) { return args.logits.dtype; }
Dtype dtype_of(const NllArgs& args) { return args.log_probs.data ? args.log_probs.dtype : args.grad_log_probs.dtype; }
Dtype dtype_of(const ElementwiseArgs& args) { return args.dtype; }

// Calls Python from a thread of any kind; what is raised there is raised here.
template <class Call>
void in_python(Call call) {
  const py::gil_scoped_acquire gil;
  try {
    call();
  } catch (py::error_already_set& error) {
    error.restore();
    python_error as_autograd_passes_it_on;
    as_autograd_passes_it_on.persist();
    throw std::move(as_autograd_passes_it_on);
  }
}

}  // namespace

void install_triton(const py::object& launchers) {
  ops::TritonKernels& kernels = ops::triton_kernels();
  static_cast<Losses<ops::TritonLaunch>&>(kernels) = kernels.map<ops::TritonLaunch>(
      [&]<class Args>(const char* name, const ops::TritonLaunch<Args>&) -> ops::TritonLaunch<Args> {
        return [launch = py::object(launchers.attr(name))](const Args& args, Pass pass, const at::Tensor& input) {
          in_python([&] {
            launch(ToPython(input, dtype_of(args))(args), named<"Pass">().attr(kPasses[static_cast<int>(pass)]));
          });
        };
      });
  kernels.rescale = [launch = py::object(launchers.attr("rescale"))](const cuda::RescaleArgs& args,
                                                                     const at::Tensor& grad) {
    in_python([&] { launch(ToPython(grad, args.dtype)(args)); });
  };
}

}  // namespace fusedloss
