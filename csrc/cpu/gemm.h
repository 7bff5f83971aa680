// Products of many rows with weights, into rows: dx.
//
// Bound by the FMA units as long as the panels in use stay close: rows go by in blocks, so each piece of a
// panel is fetched once per block and used row_block times.
#pragma once

#include "panels.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// One block of rows by one piece of the right-hand side, into rows that hold the original columns side
// by side. c[r] is the start of row r.
template <class Element, class Right, class Out>
void multiply_piece(Index rows, const Element* const* a, const Right& right, const Piece& piece, Out* const* c) {
  using Real = SumOf<Element>;
  constexpr Index width = Vec<Real>::width;
  const Columns<Element>& columns = right.columns;
  Real* target[row_block];
  if constexpr (std::is_same_v<Out, Real>) {
    const bool whole = columns.lanes(piece.panel, piece.first + piece.vectors - 1) == width;
    if (whole && elements_in<Element>(right.k_count) <= k_block<Element>) {
      for (Index r = 0; r < rows; ++r) target[r] = c[r] + columns.column(piece.panel, piece.first);
      right.multiply(rows, piece, a, {target, columns.vector_stride(), false});
      return;
    }
  }
  // Through a buffer, where the last vector is not full (whole ones would spill into the next row), where
  // sums are added to piece by piece: rows of c that lie a power of two apart would evict each other from
  // the cache every time; and where sums are rounded once they are complete.
  alignas(64) Real buffer[row_block * panel_width<Element>];
  for (Index r = 0; r < rows; ++r) target[r] = buffer + r * panel_width<Element>;
  right.multiply(rows, piece, a, {target, width, false});
  for (Index r = 0; r < rows; ++r) {
    for (Index v = 0; v < piece.vectors; ++v) {
      Out* to = c[r] + columns.column(piece.panel, piece.first + v);
      const Index lanes = columns.lanes(piece.panel, piece.first + v);
      const auto sum = Vec<Real>::load(target[r] + v * width);
      store(sum, to, lanes);
    }
  }
}

// c(m)[columns] = a(m) . right, for rows m in [0, count) and unit vectors `part`.
template <class Element, class Right, class RowIn, class RowOut>
void multiply_rows(Index count, RowIn&& a, const Right& right, Range part, RowOut&& c) {
  const Index blocks = ceil_div(count, row_block);
  for (Index block = 0; block < blocks; ++block) {
    const Range rows = share(count, block, blocks);
    const Element* in[row_block];
    decltype(c(0)) out[row_block];
    for (Index m = rows.begin; m < rows.end; ++m) {
      in[m - rows.begin] = as_elements(a(m));
      out[m - rows.begin] = c(m);
    }
    for_each_piece(right.columns, part, false, [&](const Piece& piece) {
      multiply_piece(rows.size(), in, right, piece, out);
    });
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
