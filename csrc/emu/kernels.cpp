// The CUDA kernels' own source, compiled for the emulator.
#include "platform.h"

#include "../cuda/launch.h"

namespace rnnfast::cuda {

template struct Kernels<float>;
template struct Kernels<double>;
template struct Kernels<Float16>;
template struct Kernels<BFloat16>;

// As an H200 would say.
Device& emulated_device() {
  static Device device{90, 132, 232448, 16, true};
  return device;
}

Device device_properties(int index) { return query_device(index); }

}  // namespace rnnfast::cuda
