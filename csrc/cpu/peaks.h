// The machine's own limits, measured: what the benchmarks print next to every time.
#pragma once

#include "../rnnfast.h"

namespace rnnfast::cpu {

// Floating-point operations a second that `threads` threads reach together on independent FMAs, or on
// independent products of bfloat16 pairs.
template <class Storage>
double fma_peak(int threads);

// Bytes a second that `threads` threads read together, each from `bytes` of its own.
double read_bandwidth(Index bytes, int threads);

}  // namespace rnnfast::cpu
