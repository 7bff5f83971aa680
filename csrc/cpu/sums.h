// Where the sums of a chunk of steps lie between the projection, which makes them, and the recurrence, which adds to
// them.
#pragma once

#include "parts.h"
#include "workspace.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// The sums of a chunk of steps: of all its rows, or of a thread's own. They lie as the weights' panels do, row by row
// within a panel: tiles add the recurrence's part to the projection's where it stands, and a cell finds its gates side
// by side.
template <class Element>
struct ChunkSums {
  using Real = SumOf<Element>;
  Real* first;
  Index rows;

  // A line more than its rows: panels a power of two apart would evict each other from the cache.
  static Index panel_size(Index rows) {
    return rows * panel_width<Element> + Index(cache_line / sizeof(Real));
  }
  static Index size(const Columns<Element>& columns, Index rows) {
    return columns.panels() * panel_size(rows);
  }
  // The most rows of a part of `rows` rows in each step that a chunk has room for.
  static Index rows_for(const Plan& plan, const LayerShape& shape, Index rows) {
    const Index mean = shape.mean_rows();
    return std::max(rows, plan.chunk * (plan.split == Split::rows ? ceil_div(mean, plan.threads) : mean));
  }
  // Those of all threads together. Where threads share steps, of two chunks.
  static Index size(const Columns<Element>& columns, const Plan& plan, const LayerShape& shape) {
    if (plan.split != Split::rows)
      return size(columns, rows_for(plan, shape, shape.B)) * (plan.split == Split::steps ? 2 : 1);
    return plan.threads * size(columns, rows_for(plan, shape, 0)) + columns.panels() * panel_width<Element> * shape.B;
  }
  // This thread's, who own rows or share all of them.
  static ChunkSums of(const Columns<Element>& columns, const Team& team, const Plan& plan, const LayerShape& shape,
                      Range rows, Real* sums) {
    const Index most = rows_for(plan, shape, rows.size());
    if (plan.split != Split::rows) return {sums, most};
    const Index before =
        team.rank * size(columns, rows_for(plan, shape, 0)) + columns.panels() * panel_width<Element> * rows.begin;
    return {sums + before, most};
  }
  Real* row(Piece piece, Index m) const {
    return first + piece.panel * panel_size(rows) + m * panel_width<Element> +
           piece.first * Vec<Real>::width;
  }
};

// The sums of a block of rows whose columns stand without gaps between gates, until they are spread to where the
// recurrence finds them.
template <class Element>
struct DenseSums {
  using Real = SumOf<Element>;
  Columns<Element> columns;
  Index H;
  Real* first;

  static Index row_size(const Columns<Element>& columns) { return columns.panels() * panel_width<Element>; }
  static Index size(const Columns<Element>& columns) { return row_block * row_size(columns); }
  Real* row(Piece piece, Index r) const {
    return first + r * row_size(columns) + piece.panel * panel_width<Element> + piece.first * Vec<Real>::width;
  }

  // Row r, as row m of the chunk.
  void spread(Index r, const Columns<Element>& gates, const ChunkSums<Element>& chunk, Index m) const {
    using V = Vec<Real>;
    const Real* from = first + r * row_size(columns);
    for (Index panel = 0; panel < gates.panels(); ++panel) {
      Real* to = chunk.row({panel, 0, tile_vectors}, m);
      const Index lanes = gates.lanes(panel, 0);
      for (Index v = 0; v < tile_vectors; ++v, to += V::width) {
        const Real* vector = from + gates.column(panel, v);
        (lanes == V::width ? V::load(vector) : V::load(vector, lanes)).store(to);
      }
    }
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
