// One layer in one direction as functions of tensors: `forward` for the operators, which have checked their
// arguments, and the short way past torch's dispatcher, which examines them first (python/rnnfast/direct.py).
//
// A step of a small layer takes the core some microseconds; in Python, reading seven tensors and allocating
// three takes several times that.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast::python {

// Defines forward, run_layer, run_sequence and run_step in the module.
void bind_layer(pybind11::module_& module);

}  // namespace rnnfast::python
