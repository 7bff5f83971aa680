#include "kernels.h"
#include "platform.h"

namespace rnnfast::cuda {

__global__ void nothing() {}

Device device_properties(int index) { return query_device(index, nothing); }

}  // namespace rnnfast::cuda
