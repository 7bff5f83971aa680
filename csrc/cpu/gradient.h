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

// What is in use at a time, and fits the L2 cache: `elements` of k by `panels` of the inputs and `rows` of m.
template <class Element>
struct GradientBlocks {
  static constexpr Index elements = 2048 / sizeof(Element);
  static constexpr Index terms = elements * terms_in<Element>;
  static constexpr Index panels = 4;
  static constexpr Index rows = 96;  // whole tiles
  static constexpr Index right_count = elements * panels * panel_width<Element>;
  static constexpr Index count = right_count + elements * rows;  // a thread's scratch
};

// c[r] += a . panel for the rows of one tile, at column vectors of one panel, the last of them with `lanes`.
template <class Element>
void add_tile(int rows, int vectors, Index lanes, Index elements, Left<Element> a, Panel<Element> panel,
              SumOf<Element>* const* c, bool accumulate) {
  using Real = SumOf<Element>;
  using V = Vec<Real>;
  const TileKernel<Element> tile = tiles<Element>[rows - 1][vectors - 1];
  if (lanes == V::width) return tile({0, elements}, a, panel, {c, V::width, accumulate});
  // A whole vector would spill into the next row.
  alignas(64) Real sums[tile_rows * panel_width<Element>];
  Real* sum[tile_rows];
  for (int r = 0; r < rows; ++r) sum[r] = sums + r * panel_width<Element>;
  tile({0, elements}, a, panel, {sum, V::width, false});
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      Real* to = c[r] + v * V::width;
      const Index own = v + 1 < vectors ? Index(V::width) : lanes;
      const V value = V::load(sum[r] + v * V::width);
      (accumulate ? V::load(to, own) + value : value).store(to, own);
    }
  }
}

// dw[m][columns of panel p] += sum over `elements` of left[k][m] * panel[k], for `rows` of m.
template <class Element>
void add_panel(Index rows, Index elements, const Element* left, Panel<Element> panel,
               const Columns<Element>& columns, Index p, SumOf<Element>* dw, bool accumulate) {
  const Index n = p * panel_width<Element>;
  const int vectors = int(std::min<Index>(tile_vectors, columns.unit_vectors() - p * tile_vectors));
  const Index groups = ceil_div(rows, tile_rows);
  for (Index group = 0; group < groups; ++group) {
    const Range own = share(rows, group, groups);
    const Element* a[tile_rows];
    SumOf<Element>* c[tile_rows];
    for (Index r = own.begin; r < own.end; ++r) {
      a[r - own.begin] = left + r;
      c[r - own.begin] = dw + r * columns.count() + n;
    }
    add_tile<Element>(int(own.size()), vectors, columns.lanes(p, vectors - 1), elements,
                   {a, GradientBlocks<Element>::rows}, panel, c, accumulate);
  }
}

// db[m] += sum over k of da[k][m], for `rows` of m that stand `stride` apart from k to k.
template <class Element>
void add_rows(Index rows, Index elements, const Element* da, Index stride, SumOf<Element>* db, bool accumulate) {
  using V = Vec<SumOf<Element>>;
  for (Index m = 0; m < rows; m += V::width) {
    V sum = accumulate ? V::load(db + m, rows - m) : V(SumOf<Element>(0));
    for (Index k = 0; k < elements; ++k) sum = add_terms(load_elements(da + k * stride + m, rows - m), sum);
    sum.store(db + m, rows - m);
  }
}

// What the weights were multiplied with: row_of(k) is a row of `count` numbers. Not wanted: count 0.
template <class Element, class RowOf>
struct GradientInput {
  Index count;
  RowOf row_of;
  SumOf<Element>* dw;  // (m, count)

  Columns<Element> columns() const { return {count, 1}; }
  Index panels() const { return columns().panels(); }
};

// What a thread makes of dw: some rows m of all panels, or all rows of some panels.
struct GradientPart {
  Range rows, panels;
};

// Threads that share panels copy their own alone of the inputs, which counts where few rows use each copy; but only
// rows can be shared out evenly. vectors_before(p) counts those in panels [0, p).
template <class VectorsBefore>
GradientPart gradient_part(const Team& team, Index rows, Index panels, Index width, VectorsBefore&& vectors_before) {
  constexpr double copy_cycles = 3, product_cycles = 0.5;  // of a vector
  const Index vectors = vectors_before(panels);
  const auto border = [&](Index rank) {
    Index panel = 0;  // the first that begins nearest to where this rank's share does
    while (panel < panels &&
           (vectors_before(panel) + vectors_before(panel + 1)) * team.size < 2 * rank * vectors)
      ++panel;
    return panel;
  };
  Index most = 0;  // vectors of one thread
  for (Index rank = 0; rank < team.size; ++rank)
    most = std::max(most, vectors_before(border(rank + 1)) - vectors_before(border(rank)));
  const auto cycles = [&](double own_rows, double own_vectors) {
    const double groups = own_vectors / (GradientBlocks<float>::panels * tile_vectors);  // each copies da
    return own_rows * own_vectors * product_cycles + (own_vectors + groups * own_rows / double(width)) * copy_cycles;
  };
  if (cycles(double(rows), double(most)) < cycles(double(rows) / double(team.size), double(vectors)))
    return {{0, rows}, {border(team.rank), border(team.rank + 1)}};
  return {team.share(rows), {0, panels}};
}

// This thread's part of dw[m][n] of two inputs for m in [0, rows), from rows da_of(k); with db also of
// db[m] = sum over k of da_of(k)[m]. Sums are added to what dw and db hold where `accumulate` is set.
// The panels of the second input follow those of the first, so each block of da is copied once for both.
template <class Element, class DaOf, class FirstOf, class SecondOf>
void weight_gradients(const Team& team, Index rows, Index k_count, DaOf&& da_of,
                      const GradientInput<Element, FirstOf>& first, const GradientInput<Element, SecondOf>& second,
                      SumOf<Element>* db, bool accumulate, Element* scratch) {
  using V = Vec<Element>;
  using Blocks = GradientBlocks<Element>;
  Element* const right = scratch;
  Element* const left = scratch + Blocks::right_count;
  const Index split = first.panels();
  const auto vectors_before = [&](Index panel) {
    return std::min(std::min(panel, split) * tile_vectors, first.columns().unit_vectors()) +
           std::min(std::max<Index>(panel - split, 0) * tile_vectors, second.columns().unit_vectors());
  };
  const GradientPart part = gradient_part(team, rows, split + second.panels(), V::width, vectors_before);
  for (Index panel = part.panels.begin; panel < part.panels.end; panel += Blocks::panels) {
    const Range panels{panel, std::min(panel + Blocks::panels, part.panels.end)};
    const Index blocks = std::max<Index>(ceil_div(k_count, Blocks::terms), 1);  // an empty sum is written too
    for (Index block = 0; block < blocks; ++block) {
      const Range k_range = share(k_count, block, blocks);
      const Index from = k_range.begin, terms = k_range.size();
      const bool adds = accumulate || block > 0;
      const Index elements = elements_in<Element>(terms), panel_size = elements * panel_width<Element>;
      // Calls body(input, its panels, where they are packed) for the inputs that have panels in this group.
      const auto for_each_input = [&](auto&& body) {
        const Index border = std::clamp(split, panels.begin, panels.end);
        if (panels.begin < border) body(first, Range{panels.begin, border}, right);
        if (border < panels.end)
          body(second, Range{border - split, panels.end - split}, right + (border - panels.begin) * panel_size);
      };
      for_each_input([&](const auto& input, Range own, Element* packed) {
        pack_rows(
            input.columns(), own, terms, [&](Index k) { return input.row_of(from + k); }, packed);
      });
      for (Index m = part.rows.begin; m < part.rows.end; m += Blocks::rows) {
        const Index count = std::min(Blocks::rows, part.rows.end - m);
        for (Index k = 0; k < elements; ++k) {
          const RowsOfTerms<Element> da(k, terms, [&](Index n) { return da_of(from + n) + m; });
          for (Index r = 0; r < count; r += V::width)
            store_elements(da.load(r, count - r), left + k * Blocks::rows + r, count - r);
        }
        if (db && panel == 0) add_rows(count, elements, left, Blocks::rows, db + m, adds);
        for_each_input([&](const auto& input, Range own, const Element* packed) {
          for (Index p = own.begin; p < own.end; ++p, packed += panel_size)
            add_panel<Element>(count, elements, left, {packed, panel_width<Element>}, input.columns(), p,
                      input.dw + m * input.count, adds);
        });
      }
    }
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
