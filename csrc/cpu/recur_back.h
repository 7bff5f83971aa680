// The recurrence of a layer backward: dh = da[t+1] W_hh from step to step, on windows.
//
// Row r = (j, b) is batch row b within window j of the truncation, and one kernel step takes every window one step back
// at once. Plain BPTT is the case of a single window; TBPTT(k, k) is a batch T / k times as large over k steps. Where
// windows overlap (k2 > k1) each carries its own da, and a step's da is their sum: one kernel step takes no two windows
// to the same t, so adding needs no lock, and a barrier after it fixes the order. Rows that do not run at a step, as
// their sequence or window does not reach so far, are left out.
//
// Where h is projected, dh goes through W_hr before it comes to the cell, so a step is two products, one after the
// other.
#pragma once

#include "backward_cells.h"
#include "parts.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// Memory of one backward call, shared by the team.
template <class Storage>
struct BackwardScratch {
  using Real = RealOf<Storage>;
  RowRing<Storage> da;   // (rows, G*H)  of all steps, or of the chunk in work and the one before it
  RowRing<Real> sums;    // of da over windows that overlap: da itself, or where it is added up before rounding
  RowRing<Real> gates;   // (rows, 4*H)  of all steps, or of the chunk in work; none where they were kept
  RowRing<Storage> dh;   // (rows, P)    where h is projected, as da
  const Storage** previous;  // (rows of all steps): as find_previous() gives it
  Storage* zeros;        // (G*H): the da of a step outside of its window
  Real* dh_start;        // (windows that may reach the start, B, H or P): their gradient of h0
  Real* dc_start;        // (the same, B, H): of c0
  Real *dw_ih, *dw_hh, *dw_hr, *db;  // weight gradients until all steps are added up
};

// The recurrence of one thread's part, over kernel steps [steps.begin, steps.end), the last one first.
template <class Storage, class CellLayer, class Right>
void recur_back(Team& team, const Part& part, bool shares_units, const LayerBackward<Storage>& layer,
                const Truncation& truncation, const CellLayer& cells, const Right& w_hh, const Right& w_hr, Range steps,
                const BackwardScratch<Storage>& scratch, RealOf<Storage>* buffer) {
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;
  using Row = WindowRow<Storage>;
  constexpr Index width = Vec<Real>::width;
  const LayerShape& shape = layer.shape;
  const Index B = shape.B, H = shape.H, P = shape.h_size(), GH = CellLayer::gates * H;
  const Index window_rows = truncation.blocks() * B;
  const bool overlapping = layer.k2 > layer.k1, projected = shape.projection > 0;
  const bool meets = shares_units || overlapping;

  const auto is_inside = [&](Index s, Index j, Index p) {
    return s >= 0 && s < layer.k2 && p >= 0 && p < truncation.block_end(j);
  };
  // The batch rows of window j with something to do at kernel step s: those that run then, and those whose
  // sequences begin with the step after.
  const auto rows_of = [&](Index s, Index j) -> Range {
    const Index p = truncation.window_begin(j) + s;
    const Index here = shape.rows_at(shape.time(p));
    const Index after = is_inside(s + 1, j, p + 1) ? shape.rows_at(shape.time(p + 1)) : 0;
    return {is_inside(s, j, p) ? 0 : here, std::max(here, after)};
  };
  const auto own_rows_of = [&](Index s, Index j) {
    return overlap(rows_of(s, j), {part.rows.begin - j * B, part.rows.end - j * B});
  };
  const auto da_row = [&](Index s, Index j, Index t, Index b) {
    return overlapping ? layer.da_windows + (s % 2 * window_rows + j * B + b) * GH
                       : scratch.da.at(shape.first_row(t) + b);
  };
  // Row (j, b) at kernel step s, and da of the step after it.
  const auto find_row = [&](Index s, Index j, Index b, Row& at) -> const Storage* {
    const Index p = truncation.window_begin(j) + s, t = shape.time(p), t_after = shape.after(t);
    const bool goes_on = b < shape.rows_at(t_after);
    at = {};
    at.index = j * B + b;
    at.inside = is_inside(s, j, p) && b < shape.rows_at(t);
    at.arrives = is_inside(s + 1, j, p + 1) && goes_on;
    at.has_sums = at.arrives;
    at.dc_carry = cells.dc_carry ? cells.dc_carry + at.index * H : nullptr;
    if (at.inside) {
      const Index row = shape.first_row(t) + b;
      const bool counts = p >= truncation.block_begin(j), final = counts && !goes_on;
      at.dy = counts && layer.dy ? layer.dy + row * P : nullptr;
      at.dc = counts && layer.dc ? layer.dc + row * H : nullptr;
      at.dh_n = final && layer.dh_n ? layer.dh_n + b * P : nullptr;
      at.dh = projected ? scratch.dh.at(row) : nullptr;
      at.dc_n = final && layer.dc_n ? layer.dc_n + b * H : nullptr;
      at.da = da_row(s, j, t, b);
      at.da_sum = overlapping ? scratch.sums.at(row) : nullptr;
      cells.find_saved(at, t, b);
    }
    return at.arrives ? da_row(s + 1, j, t_after, b) : scratch.zeros;
  };

  if (overlapping) {
    const Range all = team.share(shape.rows() * GH);
    std::fill(scratch.sums.rows + all.begin, scratch.sums.rows + all.end, Real(0));
    team.barrier();
  }

  const Range windows = B > 0 ? Range{part.rows.begin / B, ceil_div(part.rows.end, B)} : Range{};
  // Multiplies the rows of step s: left_of(group row, at) finds each, and what it is multiplied with; then
  // finish(at, unit, lanes, sums) is called for vectors of the columns.
  const auto multiply_step = [&](Index s, const Right& right, Range vectors, bool has_sums, auto&& left_of,
                                 auto&& prefetch, auto&& finish) {
    const Columns<Element>& columns = right.columns;
    const auto own_rows = [&](Index j) { return own_rows_of(s, j); };
    for_each_block(windows, own_rows, [&](Index count, const GroupRow* rows) {
      Row at[row_block];
      const Element* a[row_block];
      Real* sums[row_block];
      for (Index r = 0; r < count; ++r) {
        a[r] = as_elements(left_of(rows[r], at[r]));
        sums[r] = buffer + r * panel_width<Element>;
      }
      if (shares_units && has_sums) request_rows(count, a, elements_in<Element>(right.k_count));
      for_each_piece(columns, vectors, s % 2 == 1, [&](const Piece& piece) {
        const auto for_each_cell = [&](auto&& visit) RNNFAST_LAMBDA {
          for (Index r = 0; r < count; ++r)
            for (Index v = 0; v < piece.vectors; ++v)
              visit(r, sums[r] + v * width, columns.column(piece.panel, piece.first + v));
        };
        for_each_cell([&](Index r, const Real*, Index unit) RNNFAST_LAMBDA { prefetch(at[r], unit); });
        if (has_sums) right.multiply(count, piece, a, {sums, width, false});
        for_each_cell([&](Index r, const Real* sum, Index unit) RNNFAST_LAMBDA {
          const Index lanes = columns.units - unit;
          if (lanes >= width)
            finish(at[r], unit, width, sum);
          else
            finish(at[r], unit, lanes, sum);
        });
      });
    });
  };
  const auto start_dh = [&](const Row& at, Index unit, Index lanes, const Real* sums) RNNFAST_LAMBDA {
    Vec<Real>::load(sums).store(scratch.dh_start + at.index * P + unit, lanes);
  };
  const auto start_dc = [&](const Row& at, Index unit, Index lanes) RNNFAST_LAMBDA {
    if (at.dc_carry)
      Vec<Real>::load(at.dc_carry + unit, lanes).store(scratch.dc_start + at.index * H + unit, lanes);
  };
  const auto prefetch_cell = [&](const Row& at, Index unit) RNNFAST_LAMBDA {
    if (at.inside) cells.prefetch(at, unit);
  };
  const Index P_vectors = ceil_div(P, width);
  for (Index s = steps.end - 1; s >= steps.begin; --s) {
    const bool has_sums = s + 1 < layer.k2;
    if (!projected) {
      multiply_step(
          s, w_hh, part.unit_vectors, has_sums,
          [&](GroupRow row, Row& at) { return find_row(s, row.group, row.row, at); }, prefetch_cell,
          [&](const Row& at, Index unit, Index lanes, const Real* sums) RNNFAST_LAMBDA {
            if (at.inside) return cells(at, unit, lanes, sums);
            start_dh(at, unit, lanes, sums);
            start_dc(at, unit, lanes);
          });
    } else {
      multiply_step(
          s, w_hh, shares_units ? team.share(P_vectors) : Range{0, P_vectors}, has_sums,
          [&](GroupRow row, Row& at) { return find_row(s, row.group, row.row, at); },
          [](const Row&, Index) RNNFAST_LAMBDA {},
          [&](const Row& at, Index unit, Index lanes, const Real* sums) RNNFAST_LAMBDA {
            if (at.inside) return store(arriving_dh(at, unit, lanes, sums), at.dh + unit, lanes);
            start_dh(at, unit, lanes, sums);
          });
      if (shares_units) team.barrier();
      multiply_step(
          s, w_hr, part.unit_vectors, true,
          [&](GroupRow row, Row& at) -> const Storage* {
            find_row(s, row.group, row.row, at);
            at.has_sums = true;
            at.dy = at.dh_n = nullptr;  // in dh already
            return at.inside ? at.dh : scratch.zeros;
          },
          prefetch_cell,
          [&](const Row& at, Index unit, Index lanes, const Real* sums) RNNFAST_LAMBDA {
            if (at.inside) return cells(at, unit, lanes, sums);
            start_dc(at, unit, lanes);
          });
    }
    if (meets && s > steps.begin) team.barrier();
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
