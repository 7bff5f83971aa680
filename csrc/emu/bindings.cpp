// The extension module of the CUDA kernels on the emulator: the same functions, and what tests set.
#include "blas.h"
#include "faults.h"  // the emulator's platform comes first

#include "../cuda/bindings.h"
#include "simt.h"

PYBIND11_MODULE(_emulated, module) {
  module.doc() = "The CUDA kernels of rnnfast on the processor, for tests.";
  rnnfast::cuda::bind(module);
  module.def("set_seed", &rnnfast::emu::set_seed);
  module.def("set_laggard", &rnnfast::emu::set_laggard);
  module.def("take_launches", &rnnfast::emu::take_launches);
  module.def("run_fault", &rnnfast::cuda::run_fault);
  module.def("set_device", [](const rnnfast::cuda::Device& device) {
    rnnfast::cuda::emulated_device() = device;
  });
}
