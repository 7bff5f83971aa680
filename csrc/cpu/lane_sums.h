// The sums over the lanes of vectors, of as many vectors as one has lanes.
//
// By halves: each round adds the vectors in pairs, and each sum holds partial sums of both. For 16 vectors of 16
// floats that is 30 shuffles and 15 additions, where a transposition takes 64 shuffles. The first rounds stay within
// 16 bytes, the others move whole 16 bytes: shuffles that every instruction set has.
#pragma once

#include <utility>

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// Which lane of two vectors, counted through, comes to lane `to` of the half `half` (0 or 1) of a pair, after rounds
// that left partial sums of `run` vectors side by side.
template <class Real>
constexpr int lane_of_half(int to, int run, int half) {
  constexpr int width = Vec<Real>::width, unit = 16 / sizeof(Real);
  const int within = to % unit, begin = to - within;
  if (run >= unit) return 2 * begin + half * unit + within;  // every other 16 bytes of the first, then of the second
  const int piece = within / run;  // of the first and the second in turn
  return begin + half * unit / 2 + piece / 2 * run + within % run + piece % 2 * width;
}

template <class Real, int run, int... lane>
RNNFAST_INLINE Vec<Real> add_halves(Vec<Real> a, Vec<Real> b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  const Vec<Real> low = __builtin_shufflevector(a.v, b.v, lane_of_half<Real>(lane, run, 0)...);
  const Vec<Real> high = __builtin_shufflevector(a.v, b.v, lane_of_half<Real>(lane, run, 1)...);
#else
  using Lanes = typename Vec<Real>::Mask;
  const Vec<Real> low = __builtin_shuffle(a.v, b.v, Lanes{lane_of_half<Real>(lane, run, 0)...});
  const Vec<Real> high = __builtin_shuffle(a.v, b.v, Lanes{lane_of_half<Real>(lane, run, 1)...});
#endif
  return low + high;
}

// Lane i of the result is the sum over the lanes of vectors[i].
template <class Real, int run = 1>
RNNFAST_INLINE Vec<Real> lane_sums(const Vec<Real>* vectors) {
  constexpr int width = Vec<Real>::width;
  if constexpr (run == width) {
    return vectors[0];
  } else {
    Vec<Real> sums[width / run / 2];
#pragma GCC unroll 8
    for (int i = 0; i < width / run / 2; ++i)
      sums[i] = add_halves<Real, run>(vectors[2 * i], vectors[2 * i + 1], std::make_integer_sequence<int, width>());
    return lane_sums<Real, 2 * run>(sums);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
