// Matrices laid out for the tile kernels.
//
// A packed matrix is a row of panels. A panel is `tile_vectors` vectors wide and holds, for k = 0, 1, ...,
// those vectors side by side, so the inner loop reads it front to back. `Columns` says which column of the
// original each vector stands for: for an LSTM a panel is one vector of hidden units with its four
// gates side by side, so that one tile finishes whole cells; for everything else a panel is four
// consecutive vectors. Lanes behind the last column are zero.
#pragma once

#include <algorithm>

#include "team.h"
#include "tile.h"

namespace rnnfast::cpu::RNNFAST_ISA {

constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

template <class Element>
constexpr Index panel_width = tile_vectors * Vec<Element>::width;

// The columns of a packed matrix of `gates` (1 or 4) times `units` columns.
template <class Element>
struct Columns {
  Index units, gates;

  static constexpr Index width = Vec<Element>::width;

  // Work is shared out by vectors of units.
  Index unit_vectors() const { return ceil_div(units, width); }
  Index panels() const { return gates == 4 ? unit_vectors() : ceil_div(unit_vectors(), tile_vectors); }
  Index count() const { return units * gates; }

  Index unit_vector(Index panel, Index v) const {
    return gates == 4 ? panel : panel * tile_vectors + v;
  }
  Index gate(Index v) const { return gates == 4 ? v : 0; }

  // Vector v of a panel holds original columns [column, column + lanes).
  Index column(Index panel, Index v) const {
    return gate(v) * units + unit_vector(panel, v) * width;
  }
  Index lanes(Index panel, Index v) const {
    return std::clamp<Index>(units - unit_vector(panel, v) * width, 0, width);
  }
  // From one vector of a panel to the next, in original columns.
  Index vector_stride() const { return gates == 4 ? units : width; }
};

// Some vectors of one panel.
struct Piece {
  Index panel, first, vectors;
};

// Calls body(piece) for the pieces that make up unit vectors [part.begin, part.end). Recurrences go backwards
// every other step: what the L2 cache still holds of weights larger than it is what was used last.
template <class Element, class Body>
RNNFAST_INLINE void for_each_piece(const Columns<Element>& columns, Range part, bool backwards, Body&& body) {
  const Index most = columns.gates == 4 ? 1 : tile_vectors;  // unit vectors in a panel
  const Index panels = part.size() > 0 ? (part.end - 1) / most - part.begin / most + 1 : 0;
  for (Index n = 0; n < panels; ++n) {
    const Index panel = part.begin / most + (backwards ? panels - 1 - n : n);
    const Index begin = std::max(part.begin, panel * most), end = std::min(part.end, (panel + 1) * most);
    if (columns.gates == 4)
      body(Piece{panel, 0, tile_vectors});
    else
      body(Piece{panel, begin - panel * most, end - begin});
  }
}

// Transposes width x width elements in registers: log2(width) rounds, each interleaving the first half
// of the rows with the second.
template <class Element, int... lane>
RNNFAST_INLINE void interleave(Vec<Element> a, Vec<Element> b, Vec<Element>& low, Vec<Element>& high,
                               std::integer_sequence<int, lane...>) {
  constexpr int width = Vec<Element>::width;
#if defined(__clang__)
  low.v = __builtin_shufflevector(a.v, b.v, (lane / 2 + lane % 2 * width)...);
  high.v = __builtin_shufflevector(a.v, b.v, (width / 2 + lane / 2 + lane % 2 * width)...);
#else
  using Lanes = typename Vec<Element>::Mask;
  low.v = __builtin_shuffle(a.v, b.v, Lanes{(lane / 2 + lane % 2 * width)...});
  high.v = __builtin_shuffle(a.v, b.v, Lanes{(width / 2 + lane / 2 + lane % 2 * width)...});
#endif
}

template <class Element>
RNNFAST_INLINE void transpose_square(Vec<Element>* rows) {
  constexpr int width = Vec<Element>::width;
  Vec<Element> mixed[width];
#pragma GCC unroll 4
  for (int round = 1; round < width; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < width / 2; ++i)
      interleave(rows[i], rows[i + width / 2], mixed[2 * i], mixed[2 * i + 1],
                 std::make_integer_sequence<int, width>());
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) rows[i] = mixed[i];
  }
}

// to[c * to_stride + r] = element c of from(r), a row of `count` numbers. Rows are padded with zeros up to
// whole vectors of `to`.
template <class Weight, class RowOf>
void transpose(Index rows, Index count, RowOf&& from, Weight* to, Index to_stride) {
  using V = Vec<Weight>;
  constexpr int width = V::width;
  constexpr Index terms = terms_in<Weight>;
  const Index columns = elements_in<Weight>(count);
  for (Index r = 0; r < rows; r += width) {
    for (Index c = 0; c < columns; c += width) {
      const Index wide = std::min<Index>(width, columns - c);
      V square[width];
      for (Index i = 0; i < width; ++i)
        square[i] = r + i < rows ? load_rounded<Weight>(from(r + i) + c * terms, count - c * terms)
                                 : V(typename V::Native{});
      transpose_square<Weight>(square);
      for (Index i = 0; i < wide; ++i) square[i].store(to + (c + i) * to_stride + r);
    }
  }
}

// Packs panels [which.begin, which.end) of a matrix stored one row per column, as weights are:
// element (k, column) is from[column * k_count + k].
template <class Element, class Number, class Weight>
void pack_columns(const Columns<Element>& columns, Range which, Index k_count, const Number* from, Weight* to) {
  const Index panel_size = elements_in<Weight>(k_count) * panel_width<Weight>;
  for (Index panel = which.begin; panel < which.end; ++panel) {
    for (Index v = 0; v < tile_vectors; ++v) {
      Weight* vector = to + panel * panel_size + v * Vec<Weight>::width;
      const Number* first = from + columns.column(panel, v) * k_count;
      const Index lanes = columns.lanes(panel, v);
      if (lanes > 0)
        transpose(lanes, k_count, [&](Index r) { return first + r * k_count; }, vector, panel_width<Weight>);
    }
  }
}

// Element k of a sum over `k_count` terms, for every column, of a matrix stored one row per term.
template <class Element>
struct RowsOfTerms {
  const StorageOf<Element>* first;
  const StorageOf<Element>* second = nullptr;  // of a pair that is whole

  template <class RowOf>
  RowsOfTerms(Index k, Index k_count, RowOf&& row_of) : first(row_of(k * terms_in<Element>)) {
    if constexpr (terms_in<Element> == 2)
      if (2 * k + 1 < k_count) second = row_of(2 * k + 1);
  }
  // n columns from `column`, with zeros behind.
  RNNFAST_INLINE Vec<Element> load(Index column, Index n) const {
    return load_across(first + column, second ? second + column : nullptr, n);
  }
};

// Packs panels [which.begin, which.end), one behind the other from `to`, of a matrix stored one row per
// k: element (k, column) is row_of(k)[column].
template <class Element, class RowOf>
void pack_rows(const Columns<Element>& columns, Range which, Index k_count, RowOf&& row_of,
               Element* to) {
  const Index elements = elements_in<Element>(k_count);
  for (Index k = 0; k < elements; ++k) {
    const RowsOfTerms<Element> rows(k, k_count, row_of);
    for (Index panel = which.begin; panel < which.end; ++panel) {
      Element* target = to + ((panel - which.begin) * elements + k) * panel_width<Element>;
      for (Index v = 0; v < tile_vectors; ++v) {
        const Index lanes = columns.lanes(panel, v);
        if (lanes > 0)
          rows.load(columns.column(panel, v), lanes).store(target + v * Vec<Element>::width);
      }
    }
  }
}

// The right-hand side of a product, as panels: c = a . right, summed over `k_count` terms.
template <class Element, class Weight = Element>
struct Packed {
  Columns<Element> columns;
  Index k_count;
  const Weight* panels;

  // Weights in the panels of such a matrix.
  static Index size(const Columns<Element>& columns, Index k_count) {
    return columns.panels() * panel_size(k_count);
  }

  // The product of `rows` rows with one piece.
  void multiply(Index rows, const Piece& piece, const Element* const* a, const TileTarget<SumOf<Element>>& c) const {
    const Index whole = k_count / terms_in<Weight>;
    const Panel<Weight> panel{panels + piece.panel * panel_size(k_count) + piece.first * Vec<Weight>::width,
                              panel_width<Weight>};
    cpu::RNNFAST_ISA::multiply(rows, piece.vectors, whole, a, panel, c);
    if constexpr (terms_in<Weight> == 2)
      if (k_count % 2) add_last(rows, piece.vectors, whole, a, panel, c);
  }

 private:
  static Index panel_size(Index k_count) { return elements_in<Weight>(k_count) * panel_width<Weight>; }

  // The term without a partner: what stands behind it in the row is not part of the sum, and may be NaN.
  static void add_last(Index rows, Index vectors, Index k, const Element* const* a, Panel<Weight> panel,
                       const TileTarget<SumOf<Element>>& c) {
    constexpr Index parts = parts_of<Element, Weight>;
    Element last[row_block][parts];
    const Element* row[row_block];
    for (Index r = 0; r < rows; ++r) {
      if constexpr (parts == 2) {
        last[r][0] = a[r][k * parts];
        last[r][1] = Element(0);
      } else {
        last[r][0] = {*as_numbers(a[r] + k), {0}};
      }
      row[r] = last[r];
    }
    cpu::RNNFAST_ISA::multiply(rows, vectors, 1, row, Panel<Weight>{panel.first + k * panel.stride, panel.stride},
                               {c.row, c.vector_stride, true});
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
