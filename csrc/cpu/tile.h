// The one inner loop: a register tile of rows x vectors, accumulated over k.
//
//   C[r][v] (+)= sum_k  a[r][k] * panel[k][v]
//
// Bound by the FMA units: each k costs rows * vectors FMAs, `vectors` loads of the panel and `rows`
// broadcasts. With 6 x 4 that is 24 FMAs on 10 loads, so two FMA ports stay fed by two load ports.
// Each element is summed over k in order, whatever the tile's size: how work is cut into tiles, and
// so how many threads share it, never changes a result.
#pragma once

#include <array>
#include <utility>

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// Where a tile goes: row r, vector v at row[r] + v * vector_stride. Accumulate adds to what is there.
template <class Real>
struct TileTarget {
  Real* const* row;
  Index vector_stride;
  bool accumulate;
};

// Vectors side by side for k = 0, 1, ..., `stride` elements from one k to the next. Streamed: the panel
// belongs to weights too large for the L2 cache, packed so that what comes next in memory is used next.
template <class Real>
struct Panel {
  const Real* first;
  Index stride;
  bool streamed;
};

template <class Real>
using TileKernel = void (*)(Index k, const Real* const* a, Panel<Real> panel, TileTarget<Real> c);

template <class Real, int rows, int vectors>
void tile(Index k, const Real* const* a, Panel<Real> panel, TileTarget<Real> c) {
  using V = Vec<Real>;
  V sum[rows][vectors];
  const Real* row[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    row[r] = a[r];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = V(Real(0));
      // The sum is added at the end; until then the line can travel.
      if (c.accumulate) __builtin_prefetch(c.row[r] + v * c.vector_stride, 1);
    }
  }
  const Real* from = panel.first;
  for (Index i = 0; i < k; ++i, from += panel.stride) {
    V b[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) b[v] = V::load(from + v * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V broadcast(row[r][i]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(broadcast, b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Real* to = c.row[r] + v * c.vector_stride;
      (c.accumulate ? V::load(to) + sum[r][v] : sum[r][v]).store(to);
    }
  }
}

// Every size of tile, found by [rows - 1][vectors - 1].
template <class Real, int row, int... vector>
constexpr auto tile_row(std::integer_sequence<int, vector...>) {
  return std::array<TileKernel<Real>, tile_vectors>{tile<Real, row + 1, vector + 1>...};
}
template <class Real, int... row>
constexpr auto tile_table(std::integer_sequence<int, row...>) {
  return std::array<std::array<TileKernel<Real>, tile_vectors>, tile_rows>{
      tile_row<Real, row>(std::make_integer_sequence<int, tile_vectors>())...};
}
template <class Real>
inline constexpr auto tiles = tile_table<Real>(std::make_integer_sequence<int, tile_rows>());

// Sums over k are cut into pieces of this many terms: a panel's piece then stays in the L1 cache while
// all rows pass over it. A constant, because where the cuts are decides how sums are rounded.
template <class Real>
constexpr Index k_block = 512 / sizeof(Real);

// Rows that pass over one piece of a panel before the next is fetched.
constexpr Index row_block = 128;

// Asks for a share of the piece that comes next, while this one is in use: weights that live in the L3
// cache then arrive in the L2 before they are needed. Not done where they are in the L2 already: asking
// costs a tile of few rows a tenth of its time.
template <class Real>
RNNFAST_INLINE void prefetch_share(const Real* next, Index count, Index share, Index shares) {
  constexpr Index line = 64 / sizeof(Real);
  for (Index at = share * count / shares / line * line; at < (share + 1) * count / shares; at += line)
    __builtin_prefetch(next + at, 0, 2);
}

// C[0..rows)[0..vectors) (+)= a[0..rows)[0..k) . panel, for rows <= row_block and any k.
template <class Real>
void multiply(Index rows, Index vectors, Index k, const Real* const* a, Panel<Real> panel,
              TileTarget<Real> c) {
  const Index groups = (rows + tile_rows - 1) / tile_rows;
  const Real* piece[row_block];
  Index from = 0;
  do {  // at least once: an empty sum is still written
    const Index terms = k - from < k_block<Real> ? k - from : k_block<Real>;
    for (Index r = 0; r < rows; ++r) piece[r] = a[r] + from;
    for (Index group = 0; group < groups; ++group) {
      const Index first = group * rows / groups, last = (group + 1) * rows / groups;
      if (panel.streamed && groups > 1)
        prefetch_share(panel.first + (from + terms) * panel.stride, terms * panel.stride, group, groups);
      tiles<Real>[last - first - 1][vectors - 1](
          terms, piece + first, {panel.first + from * panel.stride, panel.stride, panel.streamed},
          {c.row + first, c.vector_stride, c.accumulate || from > 0});
    }
    from += terms;
  } while (from < k);
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
