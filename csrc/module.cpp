// The Python module fusedloss._C. Importing it registers the operators (csrc/register.cpp); all it exports itself is
// what this build was made of, and where Python leaves the Triton kernels. Operators are never called through pybind11:
// torch.compile could not see them.

#include <fusedloss_build_info.h>
#include <pybind11/pybind11.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("install_triton", &fusedloss::install_triton);
}
