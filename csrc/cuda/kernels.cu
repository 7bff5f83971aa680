// One number format's kernels; compiled once for each, so that the build can share them out.
#include "launch.h"

namespace rnnfast::cuda {

template struct Kernels<RNNFAST_REAL>;

}  // namespace rnnfast::cuda
