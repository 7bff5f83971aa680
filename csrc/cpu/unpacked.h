// Right-hand sides that are used too few times to be worth packing: single steps, and cells.
//
// Bound by reading the weights once. They offer what `Packed` offers.
#pragma once

#include "lane_sums.h"
#include "panels.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// A matrix stored one row per column, as weights are going forward; what would be kept as pairs is rounded alike.
// Vectors run along k, so each column is a sum of its lanes in the end, that of `width` columns together.
template <class Element, class Weight = Element>
struct UnpackedColumns {
  Columns<Element> columns;
  Index k_count;
  const StorageOf<Element>* weights;  // (columns, k)

  using Real = SumOf<Element>;

  RNNFAST_INLINE void multiply(Index rows, const Piece& piece, const Element* const* a, const TileTarget<Real>& c) const {
    for (Index v = 0; v < piece.vectors; ++v) {
      Index r = 0;
      const auto add_rows = [&](auto count) RNNFAST_LAMBDA {
        Vec<Real> sums[count];
        dot<count>(a + r, piece.panel, piece.first + v, sums);
        for (int n = 0; n < count; ++n) {
          Real* to = c.row[r + n] + v * c.vector_stride;
          (c.accumulate ? Vec<Real>::load(to) + sums[n] : sums[n]).store(to);
        }
        r += count;
      };
      while (rows - r >= most_rows) add_rows(std::integral_constant<int, most_rows>());
      if constexpr (most_rows > 2) {
        if (rows - r == 3) add_rows(std::integral_constant<int, 3>());
        if (rows - r == 2) add_rows(std::integral_constant<int, 2>());
      }
      if (rows - r == 1) add_rows(std::integral_constant<int, 1>());
    }
  }

 private:
  // Rows that use a weight while it is in a register.
  static constexpr int most_rows = vector_registers == 32 ? 4 : 2;

  // So many rows compute long enough with each weight for a prefetch of the next columns to be worth its load; with
  // fewer, the processor's own prefetching does better.
  template <int rows>
  static constexpr bool prefetches = rows >= 4;

  // Columns read at once. Rows of a power of two fall into the same sets of the L1 cache: with more of them
  // under way than a set has ways, lines would leave before they are used. Each has a sum for each row.
  template <int rows>
  static constexpr int streams = std::min(rows < most_rows ? 8 : 4, Vec<Real>::width);

  // sums[r] = a[r] . each column of vector v; lanes behind the last column repeat it.
  template <int rows>
  void dot(const Element* const* a, Index panel, Index v, Vec<Real>* sums) const {
    using V = Vec<Real>;
    const Index lanes = columns.lanes(panel, v);
    const StorageOf<Element>* numbers[rows];
    for (int r = 0; r < rows; ++r) numbers[r] = as_numbers(a[r]);
    const StorageOf<Element>* next = weights + columns.column(panel, v) * k_count;
    V sum[rows][V::width];
#pragma GCC unroll 4
    for (int lane = 0; lane < V::width; lane += streams<rows>) {
      const StorageOf<Element>* column[streams<rows>];
#pragma GCC unroll 8
      for (int i = 0; i < streams<rows>; ++i) {
        column[i] = next;
        next += lane + i + 1 < lanes ? k_count : 0;
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum[r][lane + i] = V(Real(0));
      }
      const auto add = [&](Index k, Index terms) RNNFAST_LAMBDA {
        Vec<Element> factor[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) factor[r] = load_along(numbers[r] + k, terms);
#pragma GCC unroll 8
        for (int i = 0; i < streams<rows>; ++i) {
          Vec<Element> weight = load_as_kept<Weight>(column[i] + k, terms);
          if (has_fma && rows > 1) keep_in_register(weight.v);
          if (prefetches<rows>) __builtin_prefetch(column[i] + k + streams<rows> * k_count);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) sum[r][lane + i] = multiply_add(factor[r], weight, sum[r][lane + i]);
        }
      };
      constexpr Index whole = V::width * terms_in<Element>;
      Index k = 0;
      for (; k + whole <= k_count; k += whole) add(k, whole);
      if (k < k_count) add(k, k_count - k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sums[r] = lane_sums<Real>(sum[r]);
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

  void multiply(Index rows, const Piece& piece, const Real* const* a, const TileTarget<Real>& c) const {
    const Panel<Real> panel =
        is_whole(piece.panel)
            ? Panel<Real>{weights + piece.panel * panel_width<Real>, columns.units}
            : Panel<Real>{last_panel, panel_width<Real>};
    const Panel<Real> from{panel.first + piece.first * Vec<Real>::width, panel.stride};
    cpu::RNNFAST_ISA::multiply(rows, piece.vectors, k_count, a, from, c);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
