// A layer backward: the recurrence over time in reverse, then dx and the weight gradients as large
// products over all steps.
//
// The recurrence carries dh = da[t+1] W_hh from step to step, and works on windows, not on batch rows: row
// r = (j, b) is batch row b within window j of the truncation, and one kernel step takes every window one
// step back at once. Plain BPTT is the case of a single window; TBPTT(k, k) is a batch T / k times as
// large over k steps. Where windows overlap (k2 > k1) each carries its own da, and a step's da is their
// sum: one kernel step takes no two windows to the same t, so adding needs no lock, and a barrier
// after it fixes the order.
#pragma once

#include <vector>

#include "../truncation.h"
#include "forward.h"
#include "gradient.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// A window's row at one kernel step.
struct WindowRow {
  Index b;
  Index p, t;      // the step it stands at; may lie outside of [0, T)
  bool counts;     // the step is in the window's block: losses enter
  bool starts;     // the window's last step: nothing has arrived from the step after
  bool final;      // the sequence's last step
};

template <class Real>
RNNFAST_INLINE Vec<Real> load_or_zero(const Real* from, Index lanes) {
  return from ? Vec<Real>::load(from, lanes) : Vec<Real>(Real(0));
}

// dh of one vector of units: what arrives from the step after, from y, and from h_n.
template <class Real>
RNNFAST_INLINE Vec<Real> arriving_dh(const LayerBackward<Real>& layer, WindowRow at, Index unit,
                                     Index lanes, const Real* sums) {
  using V = Vec<Real>;
  const Index H = layer.shape.H, B = layer.shape.B;
  V dh = at.starts ? V(Real(0)) : V::load(sums);
  if (at.counts && layer.dy) dh = dh + V::load(layer.dy + (at.t * B + at.b) * H + unit, lanes);
  if (at.final && layer.dh_n) dh = dh + V::load(layer.dh_n + at.b * H + unit, lanes);
  return dh;
}

template <class Real>
struct LstmBackward {
  static constexpr Index gates = 4;
  const LayerBackward<Real>& layer;
  Real* dc_carry;  // (window rows, H): dc on its way to the step before

  RNNFAST_INLINE void operator()(WindowRow at, Index row, Index unit, Index lanes, const Real* sums,
                                 Real* da_row) const {
    using V = Vec<Real>;
    const Index H = layer.shape.H, B = layer.shape.B;
    const Index here = (at.t * B + at.b) * H + unit;
    const V dh = arriving_dh(layer, at, unit, lanes, sums);
    Real* carry = dc_carry + row * H + unit;
    V dc = at.starts ? V(Real(0)) : V::load(carry, lanes);
    if (at.counts && layer.dc) dc = dc + V::load(layer.dc + here, lanes);
    if (at.final && layer.dc_n) dc = dc + V::load(layer.dc_n + at.b * H + unit, lanes);

    const Real* saved = layer.gates + (at.t * B + at.b) * 4 * H + unit;
    const LstmGates<V> gate{V::load(saved, lanes), V::load(saved + H, lanes),
                            V::load(saved + 2 * H, lanes), V::load(saved + 3 * H, lanes)};
    const Index t_prev = layer.shape.reverse ? at.t + 1 : at.t - 1;
    const Real* c_prev = at.p == 0 ? layer.c0 + at.b * H : layer.c + (t_prev * B + at.b) * H;
    LstmGates<V> da;
    lstm_backward(gate, V::load(c_prev + unit, lanes), V::load(layer.c + here, lanes), dh, dc, da);
    dc.store(carry, lanes);
    da.i.store(da_row + unit, lanes);
    da.f.store(da_row + H + unit, lanes);
    da.g.store(da_row + 2 * H + unit, lanes);
    da.o.store(da_row + 3 * H + unit, lanes);
  }

  const Real* carried(Index row) const { return dc_carry + row * layer.shape.H; }
};

template <class Real, class Nonlinearity>
struct RnnBackward {
  static constexpr Index gates = 1;
  const LayerBackward<Real>& layer;

  RNNFAST_INLINE void operator()(WindowRow at, Index, Index unit, Index lanes, const Real* sums,
                                 Real* da_row) const {
    using V = Vec<Real>;
    const V dh = arriving_dh(layer, at, unit, lanes, sums);
    const V h = V::load(layer.y + (at.t * layer.shape.B + at.b) * layer.shape.H + unit, lanes);
    Nonlinearity::backward(h, dh).store(da_row + unit, lanes);
  }

  const Real* carried(Index) const { return nullptr; }
};

// sum[gate] += from[gate] for one vector of units.
template <Index gates, class Real>
RNNFAST_INLINE void add_gates(const Real* from, Index H, Index lanes, Real* sum) {
  using V = Vec<Real>;
  for (Index offset = 0; offset < gates * H; offset += H)
    (V::load(sum + offset, lanes) + V::load(from + offset, lanes)).store(sum + offset, lanes);
}

// Memory of one backward call, shared by the team.
template <class Real>
struct BackwardScratch {
  Real* zeros;      // (G*H): the da of a step outside of its window
  Real* dh_start;   // (windows that reach the start, B, H): their gradient of h0
  Real* dc_start;   // likewise of c0
};

// The recurrence of one thread's part.
template <class Real, class CellStep, class Right>
void recur_back(Team& team, const Plan& plan, const LayerBackward<Real>& layer,
                const Truncation& truncation, CellStep cell, const Right& w_hh,
                const BackwardScratch<Real>& scratch, Real* buffer) {
  constexpr Index width = Vec<Real>::width;
  const Index B = layer.shape.B, H = layer.shape.H, GH = CellStep::gates * H;
  const Index window_rows = truncation.blocks() * B;
  const bool overlapping = layer.k2 > layer.k1;
  const Columns<Real>& columns = w_hh.columns;
  const Part part = part_of(team, plan, window_rows, columns.unit_vectors());
  const bool meets = plan.split == Split::units || overlapping;

  const auto row_at = [&](Index s, Index row) {
    const Index j = row / B, p = truncation.window_begin(j) + s, end = truncation.block_end(j);
    return WindowRow{row % B,
                     p,
                     truncation.time(p),
                     p >= truncation.block_begin(j),
                     p == end - 1,
                     p == truncation.T - 1};
  };
  const auto inside = [&](Index s, Index row) {
    const Index j = row / B, p = truncation.window_begin(j) + s;
    return s >= 0 && p >= 0 && p < truncation.block_end(j);
  };
  const auto da_of_step = [&](Index s, Index row) {
    const Index t = truncation.time(truncation.window_begin(row / B) + s);
    return layer.da + (t * B + row % B) * GH;
  };
  const auto da_row = [&](Index s, Index row) {
    return overlapping ? layer.da_windows + (s % 2 * window_rows + row) * GH : da_of_step(s, row);
  };

  if (overlapping) {
    const Range all = team.share(layer.shape.T * B * GH);
    std::fill(layer.da + all.begin, layer.da + all.end, Real(0));
    team.barrier();
  }

  const Index blocks = ceil_div(part.rows.size(), row_block);
  // One step further than the windows have: the last product is the gradient of the initial state.
  for (Index s = layer.k2 - 1; s >= -1; --s) {
    for (Index block = 0; block < blocks; ++block) {
      const Range rows = share(part.rows.size(), block, blocks);
      const Index first = part.rows.begin + rows.begin;
      const Real* a[row_block];
      Real* sums[row_block];
      for (Index r = 0; r < rows.size(); ++r) {
        const bool arrives = s + 1 < layer.k2 && inside(s + 1, first + r);
        a[r] = arrives ? da_row(s + 1, first + r) : scratch.zeros;
        sums[r] = buffer + r * panel_width<Real>;
      }
      for_each_piece(columns, part.unit_vectors, [&](Piece piece) {
        if (s + 1 < layer.k2) w_hh.multiply(rows.size(), piece, a, {sums, width, false});
        for (Index r = 0; r < rows.size(); ++r) {
          const Index row = first + r;
          const WindowRow at = row_at(s, row);
          const bool is_inside = inside(s, row);
          if (!is_inside && at.p != -1) continue;
          for (Index v = 0; v < piece.vectors; ++v) {
            const Index unit = columns.column(piece.panel, piece.first + v);
            const Index lanes = std::min(width, H - unit);
            if (is_inside) {
              cell(at, row, unit, lanes, sums[r] + v * width, da_row(s, row));
              if (overlapping)
                add_gates<CellStep::gates>(da_row(s, row) + unit, H, lanes,
                                           da_of_step(s, row) + unit);
            } else {
              Vec<Real>::load(sums[r] + v * width).store(scratch.dh_start + row * H + unit, lanes);
              if (const Real* dc = cell.carried(row))
                Vec<Real>::load(dc + unit, lanes).store(scratch.dc_start + row * H + unit, lanes);
            }
          }
        }
      });
    }
    if (meets && s >= 0) team.barrier();
  }
}

// Adds up the gradients of the initial state, window after window.
template <class Real>
void add_starts(Team& team, Index windows, Index count, const Real* starts, Real* out) {
  const Range part = team.share(count);
  for (Index n = part.begin; n < part.end; ++n) {
    Real sum(0);
    for (Index j = 0; j < windows; ++j) sum += starts[j * count + n];
    out[n] = sum;
  }
}

// dx, dw_ih, dw_hh and db of this thread's part, once all of da is there.
template <class Real, class Right>
void products(Team& team, const LayerBackward<Real>& layer, Index GH, const Right& w_ih,
              Real* blocks) {
  const Index T = layer.shape.T, B = layer.shape.B, I = layer.shape.I, H = layer.shape.H;
  const Index rows = T * B;
  const auto da_of = [&](Index row) -> const Real* { return layer.da + row * GH; };
  if (layer.dx) {
    const Columns<Real>& columns = w_ih.columns;
    // Threads share the longer side.
    const bool by_rows = rows >= row_block * team.size || rows >= I;
    const Range own = by_rows ? team.share(rows) : Range{0, rows};
    const Range vectors =
        by_rows ? Range{0, columns.unit_vectors()} : team.share(columns.unit_vectors());
    multiply_rows<Real>(
        own.size(), [&](Index m) { return da_of(own.begin + m); }, w_ih, vectors,
        [&](Index m) { return layer.dx + (own.begin + m) * I; });
  }
  const Range part = team.share(GH);
  const bool has_input = layer.dw_ih && I > 0;
  if (has_input)
    weight_gradient(
        part, I, rows, da_of, [&](Index row) { return layer.x + row * I; }, layer.dw_ih,
        layer.db, blocks);
  if (layer.dw_hh) {
    const auto h_prev = [&](Index row) -> const Real* {
      const Index t = row / B, b = row % B;
      if (layer.shape.reverse) return t == T - 1 ? layer.h0 + b * H : layer.y + (row + B) * H;
      return t == 0 ? layer.h0 + b * H : layer.y + (row - B) * H;
    };
    weight_gradient(part, H, rows, da_of, h_prev, layer.dw_hh,
                    has_input ? static_cast<Real*>(nullptr) : layer.db, blocks);
  }
}

// Packs this thread's share of the panels of a matrix stored one row per k.
template <class Real>
void pack_share(Team& team, const Columns<Real>& columns, Index k_count, const Real* from, Real* to) {
  const Range panels = team.share(columns.panels());
  pack_rows(
      columns, panels, k_count, [&](Index k) { return from + k * columns.units; },
      to + panels.begin * k_count * panel_width<Real>);
}

template <class Real, class MakeCell>
void run_backward(const LayerBackward<Real>& layer, Index gates, MakeCell&& make_cell) {
  const Index T = layer.shape.T, B = layer.shape.B, I = layer.shape.I, H = layer.shape.H;
  const Index GH = gates * H;
  const Truncation truncation{T, layer.k1, layer.k2, layer.shape.reverse};
  const Index window_rows = truncation.blocks() * B;
  const Index starts = truncation.windows_to_start() * B;
  const Columns<Real> hidden{H, 1}, input{I, 1};
  const bool pack = T * B >= packing_pays;
  const Index product_terms = gates * ((layer.dx ? I : 0) + I + H);
  const Plan plan = plan_recurrence({layer.k2, window_rows, H, 1, GH, product_terms},
                                    engine<Real>(), layer.shape.threads);

  // Without packing, only a last panel that is not full.
  const Index ih_count = layer.dx ? (pack ? input.panels() : 1) * GH * panel_width<Real> : 0;
  const Index hh_count = (pack ? hidden.panels() : 1) * GH * panel_width<Real>;
  const Index carry_count = gates == 4 ? window_rows * H : 0;
  const Index buffer_count =
      std::max<Index>(row_block * panel_width<Real>, GradientBlocks<Real>::count);
  const auto bytes = [](Index count) { return Workspace::bytes_for<Real>(count); };
  Workspace& workspace = Workspace::with_room(
      bytes(ih_count) + bytes(hh_count) + bytes(GH) + 2 * bytes(starts * H) + bytes(carry_count) +
      bytes(buffer_count * plan.threads));
  Real* packed_ih = workspace.take<Real>(ih_count);
  Real* packed_hh = workspace.take<Real>(hh_count);
  BackwardScratch<Real> scratch{};
  scratch.zeros = workspace.take<Real>(GH);
  scratch.dh_start = workspace.take<Real>(starts * H);
  scratch.dc_start = workspace.take<Real>(starts * H);
  Real* dc_carry = workspace.take<Real>(carry_count);
  Real* buffers = workspace.take<Real>(buffer_count * plan.threads);
  std::fill(scratch.zeros, scratch.zeros + GH, Real(0));

  const auto run = [&](Team& team, const auto& w_ih, const auto& w_hh) {
    Real* buffer = buffers + team.rank * buffer_count;
    recur_back(team, plan, layer, truncation, make_cell(dc_carry), w_hh, scratch, buffer);
    team.barrier();
    add_starts(team, truncation.windows_to_start(), B * H, scratch.dh_start, layer.dh0);
    if (layer.dc0)
      add_starts(team, truncation.windows_to_start(), B * H, scratch.dc_start, layer.dc0);
    products(team, layer, GH, w_ih, buffer);
  };
  auto body = [&](Team& team) {
    if (pack) {
      pack_share(team, hidden, GH, layer.w_hh, packed_hh);
      if (layer.dx) pack_share(team, input, GH, layer.w_ih, packed_ih);
      team.barrier();
      using Right = Packed<Real>;
      return run(team, Right{input, GH, packed_ih}, Right{hidden, GH, packed_hh});
    }
    using Right = UnpackedRows<Real>;
    const Right w_ih{input, GH, layer.w_ih, packed_ih}, w_hh{hidden, GH, layer.w_hh, packed_hh};
    if (team.rank == 0) {
      if (layer.dx) w_ih.pack_last(packed_ih);
      w_hh.pack_last(packed_hh);
    }
    team.barrier();
    run(team, w_ih, w_hh);
  };
  run_team(plan.threads, body);
  workspace.release();
}

template <class Real>
void layer_backward(const LayerBackward<Real>& layer) {
  if (layer.shape.cell == Cell::lstm) {
    run_backward(layer, 4, [&](Real* dc_carry) { return LstmBackward<Real>{layer, dc_carry}; });
    return;
  }
  with_rnn_cell(layer.shape.cell, [&](auto cell) {
    run_backward(layer, 1, [&](Real*) { return RnnBackward<Real, decltype(cell)>{layer}; });
  });
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
