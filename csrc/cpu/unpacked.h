// Right-hand sides that are used too few times to be worth packing: single steps, and cells.
//
// Bound by reading the weights once. They offer what `Packed` offers.
#pragma once

#include "panels.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// A matrix stored one row per column, as weights are going forward; what would be kept as pairs is rounded alike. Vectors run along k, so each column
// is a sum of its lanes in the end: `width` columns together, by one transposition.
template <class Element, class Weight = Element>
struct UnpackedColumns {
  Columns<Element> columns;
  Index k_count;
  const StorageOf<Element>* weights;  // (columns, k)

  using Real = SumOf<Element>;

  void multiply(Index rows, Piece piece, const Element* const* a, const TileTarget<Real>& c) const {
    for (Index r = 0; r < rows; ++r) {
      for (Index v = 0; v < piece.vectors; ++v) {
        const Vec<Real> sum = dot(as_numbers(a[r]), piece.panel, piece.first + v);
        Real* to = c.row[r] + v * c.vector_stride;
        (c.accumulate ? Vec<Real>::load(to) + sum : sum).store(to);
      }
    }
  }

 private:
  // Columns read at once. Rows of a power of two fall into the same sets of the L1 cache: with more of them
  // under way than a set has ways, lines would leave before they are used.
  static constexpr int streams = std::min(8, Vec<Real>::width);

  // a . each column of vector v; lanes behind the last column repeat it.
  Vec<Real> dot(const StorageOf<Element>* a, Index panel, Index v) const {
    using V = Vec<Real>;
    const Index lanes = columns.lanes(panel, v);
    const StorageOf<Element>* first = weights + columns.column(panel, v) * k_count;
    V sum[V::width];
#pragma GCC unroll 4
    for (int lane = 0; lane < V::width; lane += streams) {
      const StorageOf<Element>* row[streams];
#pragma GCC unroll 8
      for (int i = 0; i < streams; ++i) {
        row[i] = first + std::min<Index>(lane + i, lanes - 1) * k_count;
        sum[lane + i] = V(Real(0));
      }
      const auto add = [&](Index k, Index terms) RNNFAST_LAMBDA {
        const Vec<Element> factor = load_along(a + k, terms);
#pragma GCC unroll 8
        for (int i = 0; i < streams; ++i)
          sum[lane + i] = multiply_add(factor, load_as_kept<Weight>(row[i] + k, terms), sum[lane + i]);
      };
      constexpr Index whole = V::width * terms_in<Element>;
      Index k = 0;
      for (; k + whole <= k_count; k += whole) add(k, whole);
      if (k < k_count) add(k, k_count - k);
    }
    transpose_square<Real>(sum);
    V total = sum[0];
#pragma GCC unroll 16
    for (int lane = 1; lane < V::width; ++lane) total = total + sum[lane];
    return total;
  }
};

// A matrix stored one row per k, as weights are going back: whole panels are read where they lie. Only the
// last one, if it is not full, is a copy, so that no load runs past the end. Not for pairs, whose terms stand in
// two rows.
template <class Real>
struct UnpackedRows {
  Columns<Real> columns;
  Index k_count;
  const Real* weights;     // (k, columns)
  const Real* last_panel;  // packed

  // Fills last_panel, if there is one that is not full.
  void pack_last(Real* to) const {
    const Index last = columns.panels() - 1;
    if (last < 0 || is_whole(last)) return;
    pack_rows(
        columns, {last, last + 1}, k_count, [&](Index k) { return weights + k * columns.units; }, to);
  }

  bool is_whole(Index panel) const { return (panel + 1) * panel_width<Real> <= columns.units; }

  void multiply(Index rows, Piece piece, const Real* const* a, const TileTarget<Real>& c) const {
    const Panel<Real> panel =
        is_whole(piece.panel)
            ? Panel<Real>{weights + piece.panel * panel_width<Real>, columns.units}
            : Panel<Real>{last_panel, panel_width<Real>};
    const Panel<Real> from{panel.first + piece.first * Vec<Real>::width, panel.stride};
    cpu::RNNFAST_ISA::multiply(rows, piece.vectors, k_count, a, from, c);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
