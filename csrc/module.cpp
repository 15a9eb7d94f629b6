// The Python module fusedloss._C. Importing it registers the operators (csrc/register.cpp). It exports a direct road to
// the losses' operators for calls that nobody compiles, what this build was made of, how often operators have run,
// where Python leaves the Triton kernels, and what its tests ask the CUDA launcher.

#include <fusedloss_build_info.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "ops/calls.h"
#include "ops/dispatch.h"
#include "ops/double_backward.h"
#include "ops/elementwise_op.h"
#include "ops/launch.h"
#include "ops/losses.h"
#include "triton.h"

namespace {

py::dict build_info() {
  using namespace py::literals;
  return py::dict("version"_a = FUSEDLOSS_VERSION, "git_revision"_a = FUSEDLOSS_GIT_REVISION,
                  "torch"_a = FUSEDLOSS_TORCH_VERSION,
#if defined(__clang__)
                  "compiler"_a = "clang " __clang_version__,
#else
                  "compiler"_a = "gcc " __VERSION__,
#endif
#if defined(__x86_64__)
                  "cpu_capabilities"_a = py::make_tuple("default", "avx2", "avx512"),
#else
                  "cpu_capabilities"_a = py::make_tuple("default"),
#endif
                  "openmp"_a =
#if defined(_OPENMP)
                      true,
#else
                      false,
#endif
                  "cuda"_a = FUSEDLOSS_CUDA_ARCHS);
}

template <class Enum, std::size_t kCount>
Enum named(const std::array<const char*, kCount>& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw py::value_error("there is no " + name);
  return static_cast<Enum>(found - names.begin());
}

std::vector<std::int64_t> cuda_class_borders(const std::string& dtype, const std::string& pass, bool columns,
                                             bool general, std::int64_t positions, std::int64_t most) {
  using namespace fusedloss;
  constexpr std::array kDtypes{"float32", "float64", "bfloat16", "float16"};
  constexpr std::array kPasses{"forward", "forward_with_gradient", "backward"};
  return ops::cuda_class_borders(
      {named<Dtype>(kDtypes, dtype), named<Pass>(kPasses, pass), columns, general, positions}, most);
}

// The losses' operators as the dispatcher's typed functions. torch.ops looks each argument up in the schema and boxes
// it, which takes longer than a small loss does. torch.compile sees torch.ops and not these: fusedloss/backend.py
// chooses them where no compiler is at work. For the dispatcher, its keys and modes, both are the same call.
template <fusedloss::ops::Backend kBackend>
void direct(py::module_ losses) {
  using namespace fusedloss::ops;
  for_each_loss([&]<class Loss>(Loss) {
    using Forward = Operator<&Loss::forward>;
    const std::string name = Forward::handle(kBackend)->operator_name().name;
    losses.def(name.substr(name.rfind(':') + 1).c_str(),
               torch::wrap_pybind_function_no_gil(&Forward::template called<kBackend>));
  });
}

// Compiled autograd calls backward with the interpreter's lock, which autograd's engine refuses to be entered with.
void enter_engine_without_lock(const std::function<void()>& run) {
  if (!PyGILState_Check()) return run();
  const py::gil_scoped_release no_lock;
  run();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fusedloss::ops::enter_engine = &enter_engine_without_lock;
  direct<fusedloss::ops::Backend::compiled>(m.def_submodule("fusedloss"));
  direct<fusedloss::ops::Backend::triton>(m.def_submodule("fusedloss_triton"));
  m.def("build_info", &build_info);
  m.def("calls", &fusedloss::ops::Calls::all);
  m.def("install_triton", &fusedloss::install_triton);
  m.def("cuda_class_borders", &cuda_class_borders, py::kw_only(), py::arg("dtype"), py::arg("pass_"),
        py::arg("columns"), py::arg("general"), py::arg("positions"), py::arg("most"));
}
