// Weight gradients: products that sum over all time steps and batch rows.
//
//   dw[m][n] = sum over k of da[k][m] * in[k][n]
//
// Bound by the FMA units. Both sides are stored one row per k, which is the order the tile wants; a block of
// each is copied to where its rows lie densely, so that neither pages nor cache sets run out. Everything is
// added up in order of k, whatever part of dw a thread owns.
#pragma once

#include "panels.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// What is in use at a time, and fits the L2 cache: `terms` of k by `panels` of `in` and `rows` of m.
template <class Real>
struct GradientBlocks {
  static constexpr Index terms = 2048 / sizeof(Real);
  static constexpr Index panels = 4;
  static constexpr Index rows = 96;  // whole tiles
  static constexpr Index right_count = terms * panels * panel_width<Real>;
  static constexpr Index count = right_count + terms * rows;  // a thread's scratch
};

// c[r] += a . panel for the rows of one tile, at column vectors of one panel, the last of them with `lanes`.
template <class Real>
void add_tile(int rows, int vectors, Index lanes, Index terms, Left<Real> a, Panel<Real> panel, Real* const* c,
              bool accumulate) {
  using V = Vec<Real>;
  const TileKernel<Real> tile = tiles<Real>[rows - 1][vectors - 1];
  if (lanes == V::width) return tile({0, terms}, a, panel, {c, V::width, accumulate});
  // A whole vector would spill into the next row.
  alignas(64) Real sums[tile_rows * panel_width<Real>];
  Real* sum[tile_rows];
  for (int r = 0; r < rows; ++r) sum[r] = sums + r * panel_width<Real>;
  tile({0, terms}, a, panel, {sum, V::width, false});
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      Real* to = c[r] + v * V::width;
      const Index own = v + 1 < vectors ? Index(V::width) : lanes;
      const V value = V::load(sum[r] + v * V::width);
      (accumulate ? V::load(to, own) + value : value).store(to, own);
    }
  }
}

// db[m] += sum over k of da[k][m], for `rows` of m that stand `stride` apart from k to k.
template <class Real>
void add_rows(Index rows, Index terms, const Real* da, Index stride, Real* db, bool accumulate) {
  using V = Vec<Real>;
  for (Index m = 0; m < rows; m += V::width) {
    V sum = accumulate ? V::load(db + m, rows - m) : V(Real(0));
    for (Index k = 0; k < terms; ++k) sum = sum + V::load(da + k * stride + m, rows - m);
    sum.store(db + m, rows - m);
  }
}

// dw[m][0..n_count) for m in `part`, from rows da_of(k) and in_of(k); with db also db[m] = sum of da_of(k)[m].
template <class Real, class DaOf, class InOf>
void weight_gradient(Range part, Index n_count, Index k_count, DaOf&& da_of, InOf&& in_of, Real* dw, Real* db,
                     Real* scratch) {
  using V = Vec<Real>;
  using Blocks = GradientBlocks<Real>;
  const Columns<Real> columns{n_count, 1};
  Real* const right = scratch;
  Real* const left = scratch + Blocks::right_count;
  for (Index panel = 0; panel < columns.panels(); panel += Blocks::panels) {
    const Range panels{panel, std::min(panel + Blocks::panels, columns.panels())};
    Index from = 0;
    do {  // at least once: an empty sum is still written
      const Index terms = std::min(Blocks::terms, k_count - from);
      pack_rows(columns, panels, terms, [&](Index k) { return in_of(from + k); }, right);
      for (Index m = part.begin; m < part.end; m += Blocks::rows) {
        const Index rows = std::min(Blocks::rows, part.end - m);
        for (Index k = 0; k < terms; ++k) {
          const Real* da = da_of(from + k) + m;
          for (Index r = 0; r < rows; r += V::width)
            V::load(da + r, rows - r).store(left + k * Blocks::rows + r, rows - r);
        }
        if (db && panel == 0) add_rows(rows, terms, left, Blocks::rows, db + m, from > 0);
        const Index groups = ceil_div(rows, tile_rows);
        for (Index p = panels.begin; p < panels.end; ++p) {
          const Index n = p * panel_width<Real>;
          const int vectors = int(std::min<Index>(tile_vectors, ceil_div(n_count - n, V::width)));
          const Index lanes = columns.lanes(p, vectors - 1);
          const Panel<Real> in{right + (p - panels.begin) * terms * panel_width<Real>, panel_width<Real>};
          for (Index group = 0; group < groups; ++group) {
            const Range own = share(rows, group, groups);
            const Real* a[tile_rows];
            Real* c[tile_rows];
            for (Index r = own.begin; r < own.end; ++r) {
              a[r - own.begin] = left + r;
              c[r - own.begin] = dw + (m + r) * n_count + n;
            }
            add_tile<Real>(int(own.size()), vectors, lanes, terms, {a, Blocks::rows}, in, c, from > 0);
          }
        }
      }
      from += terms;
    } while (from < k_count);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
