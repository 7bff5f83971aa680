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

template <class Real>
constexpr Index panel_width = tile_vectors * Vec<Real>::width;

// The columns of a packed matrix of `gates` (1 or 4) times `units` columns.
template <class Real>
struct Columns {
  Index units, gates;

  static constexpr Index width = Vec<Real>::width;

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
template <class Real, class Body>
RNNFAST_INLINE void for_each_piece(const Columns<Real>& columns, Range part, bool backwards, Body&& body) {
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
template <class Real, int... lane>
RNNFAST_INLINE void interleave(Vec<Real> a, Vec<Real> b, Vec<Real>& low, Vec<Real>& high,
                               std::integer_sequence<int, lane...>) {
  constexpr int width = Vec<Real>::width;
#if defined(__clang__)
  low.v = __builtin_shufflevector(a.v, b.v, (lane / 2 + lane % 2 * width)...);
  high.v = __builtin_shufflevector(a.v, b.v, (width / 2 + lane / 2 + lane % 2 * width)...);
#else
  using Lanes = typename Vec<Real>::Mask;
  low.v = __builtin_shuffle(a.v, b.v, Lanes{(lane / 2 + lane % 2 * width)...});
  high.v = __builtin_shuffle(a.v, b.v, Lanes{(width / 2 + lane / 2 + lane % 2 * width)...});
#endif
}

template <class Real>
RNNFAST_INLINE void transpose_square(Vec<Real>* rows) {
  constexpr int width = Vec<Real>::width;
  Vec<Real> mixed[width];
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

// to[c * to_stride + r] = from(r)[c]. Rows are padded with zeros up to whole vectors of `to`.
template <class Real, class RowOf>
void transpose(Index rows, Index columns, RowOf&& from, Real* to, Index to_stride) {
  constexpr Index width = Vec<Real>::width;
  for (Index r = 0; r < rows; r += width) {
    for (Index c = 0; c < columns; c += width) {
      const Index wide = std::min(width, columns - c);
      Vec<Real> square[width];
      for (Index i = 0; i < width; ++i)
        square[i] = r + i < rows ? Vec<Real>::load(from(r + i) + c, wide) : Vec<Real>(Real(0));
      transpose_square<Real>(square);
      for (Index i = 0; i < wide; ++i) square[i].store(to + (c + i) * to_stride + r);
    }
  }
}

// Packs panels [which.begin, which.end) of a matrix stored one row per column, as weights are:
// element (k, column) is from[column * k_count + k].
template <class Real>
void pack_columns(const Columns<Real>& columns, Range which, Index k_count, const Real* from,
                  Real* to) {
  for (Index panel = which.begin; panel < which.end; ++panel) {
    for (Index v = 0; v < tile_vectors; ++v) {
      Real* vector = to + panel * k_count * panel_width<Real> + v * Vec<Real>::width;
      const Real* first = from + columns.column(panel, v) * k_count;
      const Index lanes = columns.lanes(panel, v);
      if (lanes > 0)
        transpose<Real>(lanes, k_count, [&](Index r) { return first + r * k_count; }, vector,
                        panel_width<Real>);
    }
  }
}

// Packs panels [which.begin, which.end), one behind the other from `to`, of a matrix stored one row per
// k: element (k, column) is row_of(k)[column].
template <class Real, class RowOf>
void pack_rows(const Columns<Real>& columns, Range which, Index k_count, RowOf&& row_of, Real* to) {
  for (Index k = 0; k < k_count; ++k) {
    const Real* row = row_of(k);
    for (Index panel = which.begin; panel < which.end; ++panel) {
      Real* target = to + ((panel - which.begin) * k_count + k) * panel_width<Real>;
      for (Index v = 0; v < tile_vectors; ++v) {
        const Index lanes = columns.lanes(panel, v);
        if (lanes > 0)
          Vec<Real>::load(row + columns.column(panel, v), lanes).store(target + v * Vec<Real>::width);
      }
    }
  }
}

// The right-hand side of a product, as panels: c = a . right, summed over `k_count` terms.
template <class Real>
struct Packed {
  Columns<Real> columns;
  Index k_count;
  const Real* panels;

  // The product of `rows` rows with one piece.
  void multiply(Index rows, Piece piece, const Real* const* a, TileTarget<Real> c) const {
    const Real* first = panels + piece.panel * k_count * panel_width<Real> +
                        piece.first * Vec<Real>::width;
    cpu::RNNFAST_ISA::multiply<Real>(rows, piece.vectors, k_count, a, {first, panel_width<Real>}, c);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
