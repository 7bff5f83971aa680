// The one inner loop: a register tile of rows x vectors, accumulated over k.
//
//   C[r][v] (+)= sum_k  a[r][k] * panel[k][v]
//
// Bound by the FMA units: each k costs rows * vectors FMAs, `vectors` loads of the panel and `rows`
// broadcasts. With 6 x 4 that is 24 FMAs on 10 loads, so two FMA ports stay fed by two load ports.
// Each element is summed over k in order, whatever the tile's size: how work is cut into tiles, and
// so how many threads share it, never changes a result.
//
// `Element` is what the left side is made of, and the panel too, unless its weights are kept as pairs.
#pragma once

#include <array>
#include <utility>

#include "bfloat16.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// Where a tile goes: row r, vector v at row[r] + v * vector_stride. Accumulate adds to what is there.
//
// Passed by reference: copies are made by vector loads, which wait until all stores before them, those of the
// tile before included, have reached the cache, as the members were stored one by one.
template <class Real>
struct TileTarget {
  Real* const* row;
  Index vector_stride;
  bool accumulate;
};

// Vectors side by side for k = 0, 1, ..., `stride` elements from one k to the next.
template <class Weight>
struct Panel {
  const Weight* first;
  Index stride;
};

// Rows whose elements stand `stride` apart: element (r, k) is row[r][k * stride].
template <class Element>
struct Left {
  const Element* const* row;
  Index stride;
};

// Elements k of the panel; it and the rows of the left side both begin at k = 0.
struct Terms {
  Index begin, end;
};

template <class Element, class Weight = Element>
using TileKernel = void (*)(Terms k, Left<Element> a, Panel<Weight> panel, const TileTarget<SumOf<Element>>& c);

// Tall tiles have issue slots to spare: they ask for the panel this many k ahead of its use, for panels that
// come from the L3 cache. Short ones load so often that the processor's own prefetching does better.
constexpr Index prefetch_terms = 32;
constexpr int prefetch_rows = 5;

template <class Element, class Weight, int rows, int vectors>
void tile(Terms k, Left<Element> a, Panel<Weight> panel, const TileTarget<SumOf<Element>>& c) {
  constexpr Index parts = parts_of<Element, Weight>;
  using Real = SumOf<Element>;
  using V = Vec<Real>;
  V sum[rows][vectors];
  const Element* row[rows];
  // Read once: as far as the compiler knows, storing a vector may change them.
  const Index vector_stride = c.vector_stride;
  const bool accumulate = c.accumulate;
  Real* to[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    row[r] = a.row[r] + k.begin * parts * a.stride;
    to[r] = c.row[r];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = V(Real(0));
      // The sum is added at the end; until then the line can travel.
      if (accumulate) __builtin_prefetch(to[r] + v * vector_stride, 1);
    }
  }
  const Weight* from = panel.first + k.begin * panel.stride;
  const Weight* ahead = from + prefetch_terms * panel.stride;
  asm("" : "+r"(ahead));  // GCC would take a register for the distance of each vector
  Index at = 0;
  for (Index i = k.begin; i < k.end; ++i, from += panel.stride, ahead += panel.stride) {
#pragma GCC unroll 2
    for (Index part = 0; part < parts; ++part, at += a.stride) {
      if constexpr (!has_fma || rows * vectors + vectors < vector_registers) {
        Vec<Element> b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          b[v] = factors<Element>(Vec<Weight>::load(from + v * V::width), part);
          if (has_fma && (rows == 2 || rows == 3)) keep_in_register(b[v].v);
          if (rows >= prefetch_rows && part == 0) __builtin_prefetch(ahead + v * V::width);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const Vec<Element> factor = broadcast(row[r] + at);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(factor, b[v], sum[r][v]);
        }
      } else {
        Vec<Element> factor[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          factor[r] = broadcast(row[r] + at);
          keep_in_register(factor[r].v);
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          Vec<Element> b = factors<Element>(Vec<Weight>::load(from + v * V::width), part);
          keep_in_register(b.v);
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r) sum[r][v] = multiply_add(factor[r], b, sum[r][v]);
        }
      }
    }
  }
  const auto finish = [&](auto&& store) RNNFAST_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store(sum[r][v], to[r] + v * vector_stride);
    }
  };
  if (accumulate)
    finish([](V value, Real* at) RNNFAST_LAMBDA { (V::load(at) + value).store(at); });
  else
    finish([](V value, Real* at) RNNFAST_LAMBDA { value.store(at); });
}

// Every size of tile, found by [rows - 1][vectors - 1].
template <class Element, class Weight, int row, int... vector>
constexpr auto tile_row(std::integer_sequence<int, vector...>) {
  return std::array<TileKernel<Element, Weight>, tile_vectors>{tile<Element, Weight, row + 1, vector + 1>...};
}
template <class Element, class Weight, int... row>
constexpr auto tile_table(std::integer_sequence<int, row...>) {
  return std::array<std::array<TileKernel<Element, Weight>, tile_vectors>, tile_rows>{
      tile_row<Element, Weight, row>(std::make_integer_sequence<int, tile_vectors>())...};
}
template <class Element, class Weight = Element>
inline constexpr auto tiles = tile_table<Element, Weight>(std::make_integer_sequence<int, tile_rows>());

// Sums over k are cut into pieces of this many elements of the left side, so that all rows pass over a panel's
// piece before it leaves the caches next to the core. A constant, because where the cuts are decides how sums are
// rounded.
template <class Element>
constexpr Index k_block = 1024 / sizeof(Element);

// Rows that pass over one piece of a panel before the next is fetched.
constexpr Index row_block = 128;

// C[0..rows)[0..vectors) (+)= a[0..rows)[0..k) . panel, for rows <= row_block and any k.
template <class Element, class Weight>
void multiply(Index rows, Index vectors, Index k, const Element* const* a, Panel<Weight> panel,
              const TileTarget<SumOf<Element>>& c) {
  constexpr Index block = k_block<Element> / parts_of<Element, Weight>;
  const Index groups = (rows + tile_rows - 1) / tile_rows;
  const Index least = rows / groups, larger = rows % groups;  // the first groups have a row more
  Terms terms{0, 0};
  do {  // at least once: an empty sum is still written
    terms = {terms.end, k - terms.end < block ? k : terms.end + block};
    Index first = 0;
    for (Index group = 0; group < groups; ++group) {
      const Index count = least + (group < larger ? 1 : 0);
      tiles<Element, Weight>[count - 1][vectors - 1](
          terms, {a + first, 1}, panel, {c.row + first, c.vector_stride, c.accumulate || terms.begin > 0});
      first += count;
    }
  } while (terms.end < k);
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
