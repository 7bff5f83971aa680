// Weights that their owner has promised to leave as they are (python/rnnfast/frozen.py): how a call knows them.
//
// By their addresses, whose memory is held meanwhile, so that no other weights can come to lie there; and by torch's
// version counters: weights that are written in a way that torch sees are known no longer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace rnnfast::python {

// The name (cpu/frozen.h) of a layer's frozen weights; 0 if they are not, or no longer. w_hr may be null.
std::uint64_t frozen_name(const void* w_ih, const void* w_hh, const void* w_hr);

// Defines Frozen and is_frozen in the module.
void bind_frozen(pybind11::module_& module);

}  // namespace rnnfast::python
