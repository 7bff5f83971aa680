// The register tile: a few rows by four vectors of columns, whose sums never leave the registers.
//
// For each term of the sum it loads four vectors of weights and one number of each row, and does rows x
// 4 vector multiply-adds with them: with 6 rows 24 on 10 loads. They belong to 24 different sums,
// enough to fill the cycles that each waits for the one before it, and few enough for 32 vector
// registers. The core's is csrc/cpu/tile.h; its Vec (csrc/cpu/simd.h), a vector as wide as the
// instruction set has, serves here too.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "layer.h"

namespace ladder {

using Vec = rnnfast::cpu::RNNFAST_ISA::Vec<float>;
using rnnfast::cpu::RNNFAST_ISA::tile_rows;     // 6, or 3 where there are fewer registers
using rnnfast::cpu::RNNFAST_ISA::tile_vectors;  // 4
constexpr Index width = Vec::width, tile_columns = tile_vectors * width;

constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// Registers have no index at run time: loops over a tile are unrolled.
template <int rows>
struct Tile {
  Vec sum[rows][tile_vectors];

  // From rows, and into rows, that are `stride` floats apart.
  RNNFAST_INLINE void load(const float* from, Index stride) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) sum[r][v] = Vec::load(from + r * stride + v * width);
  }
  RNNFAST_INLINE void store(float* to, Index stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) sum[r][v].store(to + r * stride + v * width);
  }

  // Adds a (rows, terms) . panel (terms, tile_columns), in a copy: nothing else knows its address, so the
  // compiler may leave the sums in registers until the end.
  RNNFAST_INLINE void add_product(Index terms, const float* a, const float* panel) {
    Tile total = *this;
    for (Index k = 0; k < terms; ++k, panel += tile_columns) {
      Vec weights[tile_vectors];
#pragma GCC unroll 8
      for (int v = 0; v < tile_vectors; ++v) weights[v] = Vec::load(panel + v * width);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Vec factor(a[r * terms + k]);
#pragma GCC unroll 8
        for (int v = 0; v < tile_vectors; ++v)
          total.sum[r][v] = fma(factor, weights[v], total.sum[r][v]);
      }
    }
    *this = total;
  }
};

// Cuts `count` rows into tiles: body(tile, its first row), as high as can be and then the rest.
template <int rows = tile_rows, class Body>
void for_each_tile(Index count, Body&& body, Index first = 0) {
  for (; first + rows <= count; first += rows) body(Tile<rows>(), first);
  if constexpr (rows > 1) for_each_tile<rows - 1>(count, body, first);
}

}  // namespace ladder
