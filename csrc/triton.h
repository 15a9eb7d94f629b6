// What csrc/triton.cpp gives to the Python module.

#pragma once

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fusedloss {

// Makes `launchers` (fusedloss/triton/__init__.py) the kernels of the operators of fusedloss_triton: a function for
// each loss, called with its arguments and the pass, and `rescale`, called with its arguments.
void install_triton(const py::object& launchers);

}  // namespace fusedloss
