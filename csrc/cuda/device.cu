#include "kernels.h"
#include "platform.h"

namespace rnnfast::cuda {

Device device_properties(int index) { return query_device(index); }

}  // namespace rnnfast::cuda
