// Which steps a truncated backward pass visits: the arithmetic of TBPTT(k1, k2) (Williams & Peng 1990).
//
// Blocks of k1 steps are laid out from t = 0, so in a reverse layer the short block comes first in
// processing order. A window is its block and the k2 - k1 steps before it.
#pragma once

#include "rnnfast.h"

namespace rnnfast {

struct Truncation {
  Index T, k1, k2;
  bool reverse;

  constexpr Index blocks() const { return (T + k1 - 1) / k1; }

  // Block j, counted in processing order, covers steps p in [block_begin(j), block_end(j)).
  constexpr Index block_begin(Index j) const { return j == 0 ? 0 : block_end(j - 1); }
  constexpr Index block_end(Index j) const {
    const Index first = reverse ? T - (blocks() - 1) * k1 : k1;
    const Index end = first + j * k1;
    return end < T ? end : T;
  }

  // The first step of block j's window; below zero when the window would reach further than there are
  // steps. At zero or below, the window passes gradient on to the initial state.
  constexpr Index window_begin(Index j) const { return block_begin(j) - (k2 - k1); }

  // Windows that reach the initial state: the first so many in processing order.
  constexpr Index windows_to_start() const {
    Index count = 0;
    while (count < blocks() && window_begin(count) <= 0) ++count;
    return count;
  }

  constexpr Index time(Index p) const { return reverse ? T - 1 - p : p; }
};

}  // namespace rnnfast
