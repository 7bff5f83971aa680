// The extension module of the CUDA kernels.
#include "bindings.h"

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA kernels of rnnfast; use rnnfast's Python modules instead.";
  rnnfast::cuda::bind(module);
  module.attr("architectures") = RNNFAST_ARCHITECTURES;
}
