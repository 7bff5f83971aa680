// Whether data_ptr() leads to the very elements of tensors, and these have the shapes, dtype and device that a
// launch expects: what the short way asks of CUDA tensors (python/rnnfast/cuda_direct.py). A sparse tensor has no
// storage; a lazy negation and lazy zeros are not there to be read; nor are the elements of an empty tensor.
//
// Asked in Python, attribute by attribute, it takes half a microsecond a tensor, here a seventh of one.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast::python {

// Defines are_plain in the module.
void bind_plain(pybind11::module_& module);

}  // namespace rnnfast::python
