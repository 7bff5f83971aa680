// Weight gradients: products that sum over all time steps and batch rows.
//
//   dw[m][n] = sum over k of da[k][m] * in[k][n],   in = x for W_ih, h of the step before for W_hh
//
// Bound by the FMA units. Both sides are stored one row per k, which is the order the tile wants; a block of
// each is copied to where its rows lie densely, so that neither pages nor cache sets run out. Everything is
// added up in order of k, whatever part of dw a thread owns.
#pragma once

#include "panels.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// What is in use at a time, and fits the L2 cache: `terms` of k by `panels` of the inputs and `rows` of m.
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

// dw[m][columns of panel p] += sum over `terms` of left[k][m] * panel[k], for `rows` of m.
template <class Real>
void add_panel(Index rows, Index terms, const Real* left, Panel<Real> panel, const Columns<Real>& columns, Index p,
               Real* dw, bool accumulate) {
  const Index n = p * panel_width<Real>;
  const int vectors = int(std::min<Index>(tile_vectors, columns.unit_vectors() - p * tile_vectors));
  const Index groups = ceil_div(rows, tile_rows);
  for (Index group = 0; group < groups; ++group) {
    const Range own = share(rows, group, groups);
    const Real* a[tile_rows];
    Real* c[tile_rows];
    for (Index r = own.begin; r < own.end; ++r) {
      a[r - own.begin] = left + r;
      c[r - own.begin] = dw + r * columns.count() + n;
    }
    add_tile<Real>(int(own.size()), vectors, columns.lanes(p, vectors - 1), terms,
                   {a, GradientBlocks<Real>::rows}, panel, c, accumulate);
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

// What the weights were multiplied with: row_of(k) is a row of `count` elements. Not wanted: count 0.
template <class Real, class RowOf>
struct GradientInput {
  Index count;
  RowOf row_of;
  Real* dw;  // (m, count)

  Columns<Real> columns() const { return {count, 1}; }
  Index panels() const { return columns().panels(); }
};

// dw[m][n] of two inputs for m in `part`, from rows da_of(k); with db also db[m] = sum over k of da_of(k)[m].
// Sums are added to what dw and db hold where `accumulate` is set.
// The panels of the second input follow those of the first, so each block of da is copied once for both.
template <class Real, class DaOf, class FirstOf, class SecondOf>
void weight_gradients(Range part, Index k_count, DaOf&& da_of, const GradientInput<Real, FirstOf>& first,
                      const GradientInput<Real, SecondOf>& second, Real* db, bool accumulate,
                      Real* scratch) {
  using V = Vec<Real>;
  using Blocks = GradientBlocks<Real>;
  Real* const right = scratch;
  Real* const left = scratch + Blocks::right_count;
  const Index all_panels = first.panels() + second.panels();
  for (Index panel = 0; panel < all_panels; panel += Blocks::panels) {
    const Range panels{panel, std::min(panel + Blocks::panels, all_panels)};
    const Index blocks = std::max<Index>(ceil_div(k_count, Blocks::terms), 1);  // an empty sum is written too
    for (Index block = 0; block < blocks; ++block) {
      const Range k_range = share(k_count, block, blocks);
      const Index from = k_range.begin, terms = k_range.size();
      const bool adds = accumulate || block > 0;
      const Index panel_size = terms * panel_width<Real>;
      // Calls body(input, its panels, where they are packed) for the inputs that have panels in this group.
      const auto for_each_input = [&](auto&& body) {
        const Index split = std::clamp(first.panels(), panels.begin, panels.end);
        if (panels.begin < split) body(first, Range{panels.begin, split}, right);
        if (split < panels.end)
          body(second, Range{split - first.panels(), panels.end - first.panels()},
               right + (split - panels.begin) * panel_size);
      };
      for_each_input([&](const auto& input, Range own, Real* packed) {
        pack_rows(
            input.columns(), own, terms, [&](Index k) { return input.row_of(from + k); }, packed);
      });
      for (Index m = part.begin; m < part.end; m += Blocks::rows) {
        const Index rows = std::min(Blocks::rows, part.end - m);
        for (Index k = 0; k < terms; ++k) {
          const Real* da = da_of(from + k) + m;
          for (Index r = 0; r < rows; r += V::width)
            V::load(da + r, rows - r).store(left + k * Blocks::rows + r, rows - r);
        }
        if (db && panel == 0) add_rows(rows, terms, left, Blocks::rows, db + m, adds);
        for_each_input([&](const auto& input, Range own, const Real* packed) {
          for (Index p = own.begin; p < own.end; ++p, packed += panel_size)
            add_panel(rows, terms, left, {packed, panel_width<Real>}, input.columns(), p,
                      input.dw + m * input.count, adds);
        });
      }
    }
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
