// Matrix products over all time steps: the projection, dx, and the weight gradients.
//
// Bound by the FMA units as long as the panels in use stay close: rows go by in blocks, so each piece of a
// panel is fetched once per block and used row_block times.
#pragma once

#include "panels.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// One block of rows by one piece of the right-hand side, into rows that hold the original columns side
// by side. c[r] is the start of row r.
template <class Real, class Right>
void multiply_piece(Index rows, const Real* const* a, const Right& right, Piece piece,
                    Real* const* c, bool accumulate) {
  constexpr Index width = Vec<Real>::width;
  const Columns<Real>& columns = right.columns;
  Real* target[row_block];
  const bool whole = columns.lanes(piece.panel, piece.first + piece.vectors - 1) == width;
  if (whole && right.k_count <= k_block<Real>) {
    for (Index r = 0; r < rows; ++r) target[r] = c[r] + columns.column(piece.panel, piece.first);
    right.multiply(rows, piece, a, {target, columns.vector_stride(), accumulate});
    return;
  }
  // Through a buffer, where the last vector is not full (whole ones would spill into the next row), and
  // where sums are added to piece by piece: rows of c that lie a power of two apart would evict each
  // other from the cache every time.
  alignas(64) Real buffer[row_block * panel_width<Real>];
  for (Index r = 0; r < rows; ++r) target[r] = buffer + r * panel_width<Real>;
  right.multiply(rows, piece, a, {target, width, false});
  for (Index r = 0; r < rows; ++r) {
    for (Index v = 0; v < piece.vectors; ++v) {
      Real* to = c[r] + columns.column(piece.panel, piece.first + v);
      const Index lanes = columns.lanes(piece.panel, piece.first + v);
      const auto sum = Vec<Real>::load(target[r] + v * width);
      (accumulate ? Vec<Real>::load(to, lanes) + sum : sum).store(to, lanes);
    }
  }
}

// c(m)[columns] = a(m) . right, for rows m in [0, count) and unit vectors `part`.
template <class Real, class Right, class RowIn, class RowOut>
void multiply_rows(Index count, RowIn&& a, const Right& right, Range part, RowOut&& c) {
  const Index blocks = ceil_div(count, row_block);
  for (Index block = 0; block < blocks; ++block) {
    const Range rows = share(count, block, blocks);
    const Real* in[row_block];
    Real* out[row_block];
    for (Index m = rows.begin; m < rows.end; ++m) {
      in[m - rows.begin] = a(m);
      out[m - rows.begin] = c(m);
    }
    for_each_piece(right.columns, part, [&](Piece piece) {
      multiply_piece<Real>(rows.size(), in, right, piece, out, false);
    });
  }
}

// A thread's scratch for weight_gradient.
template <class Real>
struct GradientBlocks {
  static constexpr Index terms = 256;   // time steps and batch rows taken at once
  static constexpr Index panels = 8;    // of the right-hand side, packed
  static constexpr Index count = terms * (panels * panel_width<Real> + row_block);
};

// dw[m][n] = sum over k of da_of(k)[m] * in_of(k)[n], for m in `part`; k runs over steps and batch rows.
// Adds up in order of k whatever `part` is. Where db is given, also db[m] = sum over k of da_of(k)[m].
template <class Real, class DaOf, class InOf>
void weight_gradient(Range part, Index n_count, Index k_count, DaOf&& da_of, InOf&& in_of, Real* dw,
                     Real* db, Real* scratch) {
  using Blocks = GradientBlocks<Real>;
  const Columns<Real> columns{n_count, 1};
  Real* right = scratch;
  Real* left = scratch + Blocks::terms * Blocks::panels * panel_width<Real>;
  for (Index panel = 0; panel < columns.panels(); panel += Blocks::panels) {
    const Range panels{panel, std::min(panel + Blocks::panels, columns.panels())};
    const Range vectors{panels.begin * tile_vectors,
                        std::min(panels.end * tile_vectors, columns.unit_vectors())};
    Index from = 0;
    do {  // at least once: an empty sum is still written
      const Index terms = std::min(Blocks::terms, k_count - from);
      const bool accumulate = from > 0;
      pack_rows(columns, panels, terms, [&](Index k) { return in_of(from + k); }, right);
      for (Index m = part.begin; m < part.end; m += row_block) {
        const Index rows = std::min(row_block, part.end - m);
        const Real* a[row_block];
        Real* c[row_block];
        for (Index r = 0; r < rows; ++r) {
          a[r] = left + r * Blocks::terms;
          c[r] = dw + (m + r) * n_count;
        }
        transpose<Real>(terms, rows, [&](Index k) { return da_of(from + k) + m; }, left,
                        Blocks::terms);
        const Packed<Real> block{columns, terms, right - panels.begin * terms * panel_width<Real>};
        for_each_piece(columns, vectors, [&](Piece piece) {
          multiply_piece<Real>(rows, a, block, piece, c, accumulate);
        });
        if (db && panel == 0) {
          for (Index r = 0; r < rows; ++r) {
            Real sum = accumulate ? db[m + r] : Real(0);
            for (Index k = 0; k < terms; ++k) sum += a[r][k];
            db[m + r] = sum;
          }
        }
      }
      from += terms;
    } while (from < k_count);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
