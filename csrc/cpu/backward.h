// A layer backward: the recurrence over time in reverse, and dx and the weight gradients as large products.
//
// The recurrence carries dh = da[t+1] W_hh from step to step, and works on windows, not on batch rows: row
// r = (j, b) is batch row b within window j of the truncation, and one kernel step takes every window one
// step back at once. Plain BPTT is the case of a single window; TBPTT(k, k) is a batch T / k times as
// large over k steps. Where windows overlap (k2 > k1) each carries its own da, and a step's da is their
// sum: one kernel step takes no two windows to the same t, so adding needs no lock, and a barrier
// after it fixes the order. Rows that do not run at a step, as their sequence or window does not reach so far, are
// left out.
//
// Where h is projected, dh goes through W_hr before it comes to the cell, so a step is two products, one after the
// other.
//
// A single window goes by in chunks of steps, recurrence and products in turn: da, the largest array of all,
// is then used while it is in cache, and never stored for the whole sequence. Gates that were not kept are
// computed again the same way, at the beginning of their chunk.
#pragma once

#include "../truncation.h"
#include "forward.h"
#include "gemm.h"
#include "gradient.h"
#include "recompute.h"
#include "steps.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// A row of a window at one kernel step: where its operands of hidden unit 0 stand. Null gradients are zero.
template <class Storage>
struct WindowRow {
  using Real = RealOf<Storage>;
  Index index;
  bool inside;            // it runs at this step; else this is the step before its sequence's first
  bool arrives;           // something comes from the step after
  bool has_sums;          // of a product; else there is none yet
  const Storage *dy, *dh_n;  // the losses' part, where they count for this window
  const Real *dc, *dc_n;
  const Real *gates, *c, *c_prev;  // saved by an LSTM
  const Storage* h;                // saved by an RNN
  Storage* da;
  Storage* dh;   // where h is projected: its gradient, complete
  Real* da_sum;  // where windows overlap: the sum over windows
  Real* dc_carry;  // dc on its way to the step before
};

template <class Storage>
RNNFAST_INLINE void add_if(Vec<RealOf<Storage>>& sum, const Storage* from, Index unit, Index lanes) {
  if (from) sum = sum + load(from + unit, lanes);
}

// dh of one vector: what arrives from the step after, from y, and from h_n.
template <class Storage, class Real = RealOf<Storage>>
RNNFAST_INLINE Vec<Real> arriving_dh(const WindowRow<Storage>& row, Index unit, Index lanes,
                                     const Real* sums) {
  Vec<Real> dh = row.has_sums ? Vec<Real>::load(sums) : Vec<Real>(Real(0));
  add_if(dh, row.dy, unit, lanes);
  add_if(dh, row.dh_n, unit, lanes);
  return dh;
}

// Stores da of one gate, and adds it to the sum over windows.
template <class Storage, class Real = RealOf<Storage>>
RNNFAST_INLINE void put_da(const WindowRow<Storage>& row, Index column, Index lanes, Vec<Real> da) {
  store(da, row.da + column, lanes);
  if (row.da_sum) (Vec<Real>::load(row.da_sum + column, lanes) + da).store(row.da_sum + column, lanes);
}

template <class Storage>
struct LstmBackward {
  using Real = RealOf<Storage>;
  static constexpr Index gates = 4;
  const LayerBackward<Storage>& layer;
  Real* dc_carry;             // (window rows, H)
  RowRing<Real> recomputed;  // gates that were not kept

  void find_saved(WindowRow<Storage>& row, Index t, Index b) const {
    const LayerShape& shape = layer.shape;
    const Index H = shape.H, t_prev = shape.before(t), here = shape.first_row(t) + b;
    row.gates = layer.gates ? layer.gates + here * 4 * H : recomputed.at(here);
    row.c = layer.c + here * H;
    row.c_prev = b < shape.rows_at(t_prev) ? layer.c + (shape.first_row(t_prev) + b) * H : layer.c0 + b * H;
  }

  RNNFAST_INLINE void prefetch(const WindowRow<Storage>& row, Index unit) const {
    const Index H = layer.shape.H;
    for (Index gate = 0; gate < 4; ++gate) {
      prefetch_vector(row.gates + gate * H + unit);
      prefetch_vector(row.da + gate * H + unit);
    }
    prefetch_vector(row.c + unit);
    prefetch_vector(row.c_prev + unit);
    if (row.dy) prefetch_vector(row.dy + unit);
  }

  RNNFAST_INLINE void operator()(const WindowRow<Storage>& row, Index unit, Index lanes,
                                 const Real* sums) const {
    using V = Vec<Real>;
    const Index H = layer.shape.H;
    const V dh = arriving_dh(row, unit, lanes, sums);
    V dc = row.arrives ? V::load(row.dc_carry + unit, lanes) : V(Real(0));
    add_if(dc, row.dc, unit, lanes);
    add_if(dc, row.dc_n, unit, lanes);
    const auto gate_of = [&](Index gate)
                             RNNFAST_LAMBDA { return V::load(row.gates + gate * H + unit, lanes); };
    const LstmGates<V> gate{gate_of(0), gate_of(1), gate_of(2), gate_of(3)};
    LstmGates<V> da;
    lstm_backward(gate, V::load(row.c_prev + unit, lanes), V::load(row.c + unit, lanes), dh, dc, da);
    dc.store(row.dc_carry + unit, lanes);
    put_da(row, unit, lanes, da.i);
    put_da(row, H + unit, lanes, da.f);
    put_da(row, 2 * H + unit, lanes, da.g);
    put_da(row, 3 * H + unit, lanes, da.o);
  }
};

template <class Storage, class Nonlinearity>
struct RnnBackward {
  using Real = RealOf<Storage>;
  static constexpr Index gates = 1;
  const LayerBackward<Storage>& layer;
  Real* dc_carry;             // none: null
  RowRing<Real> recomputed;  // none

  void find_saved(WindowRow<Storage>& row, Index t, Index b) const {
    row.h = layer.y + (layer.shape.first_row(t) + b) * layer.shape.H;
  }

  RNNFAST_INLINE void prefetch(const WindowRow<Storage>& row, Index unit) const {
    prefetch_vector(row.h + unit);
    prefetch_vector(row.da + unit);
    if (row.dy) prefetch_vector(row.dy + unit);
  }

  RNNFAST_INLINE void operator()(const WindowRow<Storage>& row, Index unit, Index lanes,
                                 const Real* sums) const {
    using V = Vec<Real>;
    const V dh = arriving_dh(row, unit, lanes, sums);
    put_da(row, unit, lanes, Nonlinearity::backward(load(row.h + unit, lanes), dh));
  }
};

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

// Row n of windows is batch row n % B of window n / B. This thread's part of them, by the steps they run for.
template <class Storage>
Part part_of(const Team& team, const Plan& plan, const LayerBackward<Storage>& layer, const Truncation& truncation,
             Index unit_vectors) {
  const LayerShape& shape = layer.shape;
  const Index B = shape.B, rows = truncation.blocks() * B;
  if (!shape.offsets) return part_of(team, plan, rows, unit_vectors);
  return part_of(team, plan, rows, unit_vectors, [&](Index first_rows) {
    Index work = 0;
    for (Index j = 0; j * B < first_rows; ++j)
      for (Index p = std::max<Index>(truncation.window_begin(j), 0); p < truncation.block_end(j); ++p)
        work += std::min(first_rows - j * B, shape.rows_at(shape.time(p)));
    return work;
  });
}

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
      for_each_piece(columns, vectors, s % 2 == 1, [&](Piece piece) {
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

// Adds up the gradients of the initial state, window after window.
template <class Real, class Storage>
void add_starts(Team& team, Index windows, Index count, const Real* starts, Storage* out) {
  const Range part = team.share(count);
  for (Index n = part.begin; n < part.end; ++n) {
    Real sum(0);
    for (Index j = 0; j < windows; ++j) sum += starts[j * count + n];
    store(sum, out + n);
  }
}

// Rounds this thread's share of sums to where they are kept, if that is elsewhere. Not wanted: null.
template <class Real, class Storage>
void round_share(Team& team, Index count, const Real* sums, Storage* to) {
  if constexpr (!std::is_same_v<Real, Storage>) {
    if (!to) return;
    const Range part = team.share(count);
    for (Index n = part.begin; n < part.end; n += Vec<Real>::width)
      store(Vec<Real>::load(sums + n, part.end - n), to + n, part.end - n);
  }
}

// This thread's part of dx of some rows of all steps, and of what they add to dw_ih, dw_hh and db.
template <class Storage, class Right>
void products(Team& team, const StepInputs<Storage>& inputs, bool accumulate,
              const BackwardScratch<Storage>& scratch, const Right& w_ih, ElementOf<Storage>* blocks) {
  using Element = ElementOf<Storage>;
  const LayerBackward<Storage>& layer = inputs.layer;
  const Index I = layer.shape.I, H = layer.shape.H;
  const Index GH = gate_count(layer.shape.cell) * H;
  const Index rows = inputs.rows.size();
  const auto da_of = [&](Index k) -> const Storage* { return scratch.da.at(inputs.rows.begin + k); };
  if (layer.dx) {
    const Columns<Element>& columns = w_ih.columns;
    // Threads share the longer side.
    const bool by_rows = rows >= row_block * team.size || rows >= I;
    const Range own = by_rows ? team.share(rows) : Range{0, rows};
    const Range vectors =
        by_rows ? Range{0, columns.unit_vectors()} : team.share(columns.unit_vectors());
    multiply_rows<Element>(
        own.size(), [&](Index m) { return da_of(own.begin + m); }, w_ih, vectors,
        [&](Index m) { return layer.dx + (inputs.rows.begin + own.begin + m) * I; });
  }
  if (layer.dw_hr) {
    const auto dh_of = [&](Index k) -> const Storage* { return scratch.dh.at(inputs.rows.begin + k); };
    const auto m_of = [&](Index k) -> const Storage* { return layer.m + (inputs.rows.begin + k) * H; };
    const auto nothing_of = [&](Index) -> const Storage* { return nullptr; };
    weight_gradients<Element>(team.share(layer.shape.h_size()), rows, dh_of,
                              GradientInput<Element, decltype(m_of)>{H, m_of, scratch.dw_hr},
                              GradientInput<Element, decltype(nothing_of)>{0, nothing_of, nullptr}, nullptr,
                              accumulate, blocks);
  }
  if (!layer.dw_ih && !layer.dw_hh) return;
  const auto x_of = [&](Index k) { return inputs.x(k); };
  const auto h_prev_of = [&](Index k) { return inputs.h_prev(k); };
  weight_gradients<Element>(
      team.share(GH), rows, da_of,
      GradientInput<Element, decltype(x_of)>{layer.dw_ih ? I : 0, x_of, scratch.dw_ih},
      GradientInput<Element, decltype(h_prev_of)>{layer.dw_hh ? layer.shape.h_size() : 0, h_prev_of, scratch.dw_hh}, scratch.db,
      accumulate, blocks);
}

// Packs this thread's share of the panels of a matrix stored one row per k.
template <class Element>
void pack_share(Team& team, const Columns<Element>& columns, Index k_count, const StorageOf<Element>* from,
                Element* to) {
  const Range panels = team.share(columns.panels());
  pack_rows(
      columns, panels, k_count, [&](Index k) { return from + k * columns.units; },
      to + panels.begin * elements_in<Element>(k_count) * panel_width<Element>);
}

// The most rows in a chunk of steps: whole blocks of the gradients' terms, two of them where their da stays in cache.
template <class Storage>
Index chunk_rows(const LayerShape& shape, Index GH) {
  constexpr Index terms = GradientBlocks<ElementOf<Storage>>::terms, cache_bytes = Index(8) << 20;
  const Index most = 2 * terms * GH * Index(sizeof(Storage)) <= cache_bytes ? 2 * terms : terms;
  const Index chunks = std::clamp<Index>(ceil_div(shape.rows(), most), 1, shape.T);
  return std::max(shape.B, ceil_div(shape.T, chunks) * shape.mean_rows());
}

template <class CellLayer, class Storage>
void run_backward(const LayerBackward<Storage>& layer) {
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;
  constexpr bool rounds = !std::is_same_v<Storage, Real>;
  constexpr Index gates = CellLayer::gates;
  const LayerShape& shape = layer.shape;
  const Index T = shape.T, B = shape.B, I = shape.I, H = shape.H, N = shape.rows();
  const Index GH = gates * H, P = shape.h_size();
  const bool projected = shape.projection > 0;
  const Truncation truncation{T, layer.k1, layer.k2, shape.reverse};
  const Index window_rows = truncation.blocks() * B;
  // In reverse, packed sequences begin in one window or another.
  const bool starts_anywhere = shape.offsets && shape.reverse;
  const Index windows_to_start = starts_anywhere ? truncation.blocks() : truncation.windows_to_start();
  const Index starts = windows_to_start * B;
  const Columns<Element> hidden{P, 1}, input{I, 1}, cell{projected ? H : 0, 1};
  const Plan plan =
      plan_backward(shape, layer.k1, layer.k2, layer.dx != nullptr, engine<Element>());
  const bool pack = terms_in<Element> > 1 || plan.pack;

  // Without packing, only a last panel that is not full.
  const auto packed_size = [&](const Columns<Element>& columns, Index k_count) {
    return Packed<Element>::size(pack ? columns : Columns<Element>{1, 1}, k_count);
  };
  const Index ih_count = layer.dx ? packed_size(input, GH) : 0;
  const Index hh_count = packed_size(hidden, GH);
  const Index hr_count = projected ? packed_size(cell, P) : 0;
  const Index carry_count = gates == 4 ? window_rows * H : 0;
  const bool whole = layer.k1 < T;  // several windows take each step all over the sequence
  const bool overlapping = layer.k2 > layer.k1;
  const Index chunk = whole ? N : std::min(chunk_rows<Storage>(shape, GH), N);
  const Index ring = std::min(2 * chunk, N);
  const Index da_count = whole ? 0 : ring * GH;
  const Index dh_count = projected ? ring * P : 0;
  const Index dw_ih_count = rounds && layer.dw_ih ? GH * I : 0;
  const Index dw_hh_count = rounds && layer.dw_hh ? GH * P : 0;
  const Index dw_hr_count = rounds && layer.dw_hr ? P * H : 0;
  const Index db_count = rounds && layer.db ? GH : 0;
  GateRecompute<Storage> recompute(layer);
  // Each da may take the place of its gate, if it is as large and no other window reads the gate.
  const bool own_gates = recompute.needed() && (rounds || overlapping);
  const Index gates_count = own_gates ? chunk * GH : 0;
  const Index buffer_count =
      std::max<Index>(GateRecompute<Storage>::buffer_count, GradientBlocks<Element>::count);
  const auto bytes = [](Index count) { return Workspace::bytes_for<Real>(count); };
  Workspace& workspace = Workspace::with_room(
      Workspace::bytes_for<Element>(ih_count) + Workspace::bytes_for<Element>(hh_count) +
      Workspace::bytes_for<Element>(hr_count) + Workspace::bytes_for<Storage>(GH) + bytes(starts * P) +
      bytes(starts * H) + bytes(carry_count) + Workspace::bytes_for<Storage>(da_count) +
      Workspace::bytes_for<Storage>(dh_count) + bytes(gates_count) + recompute.bytes() +
      bytes(dw_ih_count) + bytes(dw_hh_count) + bytes(dw_hr_count) + bytes(db_count) + bytes(buffer_count * plan.threads) +
      Workspace::bytes_for<const Storage*>(N));
  Element* packed_ih = workspace.take<Element>(ih_count);
  Element* packed_hh = workspace.take<Element>(hh_count);
  Element* packed_hr = workspace.take<Element>(hr_count);
  BackwardScratch<Storage> scratch{};
  scratch.zeros = workspace.take<Storage>(GH);
  scratch.dh_start = workspace.take<Real>(starts * P);
  scratch.dc_start = workspace.take<Real>(starts * H);
  Real* dc_carry = workspace.take<Real>(carry_count);
  scratch.da = {whole ? layer.da : workspace.take<Storage>(da_count), ring, GH};
  scratch.dh = {workspace.take<Storage>(dh_count), ring, P};
  scratch.gates = {workspace.take<Real>(gates_count), chunk, GH};
  scratch.previous = workspace.take<const Storage*>(N);
  recompute.take(workspace);
  if constexpr (rounds) {
    scratch.sums = {layer.da_sums, N, GH};
    scratch.dw_ih = workspace.take<Real>(dw_ih_count);
    scratch.dw_hh = workspace.take<Real>(dw_hh_count);
    scratch.dw_hr = workspace.take<Real>(dw_hr_count);
    scratch.db = layer.db ? workspace.take<Real>(db_count) : nullptr;
  } else {
    scratch.sums = scratch.da;
    if (!own_gates) scratch.gates = scratch.da;
    scratch.dw_ih = layer.dw_ih;
    scratch.dw_hh = layer.dw_hh;
    scratch.dw_hr = layer.dw_hr;
    scratch.db = layer.db;
  }
  Real* buffers = workspace.take<Real>(buffer_count * plan.threads);
  std::fill(scratch.zeros, scratch.zeros + GH, Storage{});
  find_previous(shape, layer.y, layer.h0, scratch.previous);
  if (starts_anywhere) {
    std::fill(scratch.dh_start, scratch.dh_start + starts * P, Real(0));
    std::fill(scratch.dc_start, scratch.dc_start + starts * H, Real(0));
  }

  const auto run = [&](Team& team, const auto& w_ih, const auto& w_hh, const auto& w_hr) {
    Real* buffer = buffers + team.rank * buffer_count;
    const CellLayer cells{layer, gates == 4 ? dc_carry : nullptr, scratch.gates};
    const Part part = part_of(team, plan, layer, truncation, ceil_div(H, Index(Vec<Real>::width)));
    const bool shares_units = plan.split == Split::units;
    for (Index end = T; end > 0;) {
      const Index begin =
          end - steps_within(chunk, end, [&](Index n) { return shape.rows_at(shape.time(end - 1 - n)); });
      const StepInputs<Storage> inputs{layer, scratch.previous, rows_of_steps(shape, {begin, end})};
      // At the start one step further: the last product is the gradient of the initial state.
      const Range steps{begin == 0 ? -1 : begin, whole ? layer.k2 : end};
      if (recompute.needed()) {
        recompute.run(team, inputs, scratch.gates, buffer);
        team.barrier();
      }
      recur_back(team, part, shares_units, layer, truncation, cells, w_hh, w_hr, steps, scratch, buffer);
      // Everybody's da is there; and nobody reads the chunk before, whose place the next one takes.
      team.barrier();
      if (rounds && overlapping) {
        round_share(team, N * GH, scratch.sums.rows, layer.da);
        team.barrier();
      }
      products(team, inputs, end < T, scratch, w_ih, reinterpret_cast<Element*>(buffer));
      end = begin;
    }
    if (layer.dh0)
      add_starts(team, windows_to_start, B * P, scratch.dh_start, layer.dh0);
    if (layer.dc0)
      add_starts(team, windows_to_start, B * H, scratch.dc_start, layer.dc0);
    if (rounds) {
      team.barrier();
      round_share(team, GH * I, scratch.dw_ih, layer.dw_ih);
      round_share(team, GH * P, scratch.dw_hh, layer.dw_hh);
      round_share(team, P * H, scratch.dw_hr, layer.dw_hr);
      round_share(team, GH, scratch.db, layer.db);
    }
  };
  auto body = [&](Team& team) {
    recompute.pack_share(team);
    if (pack) {
      pack_share(team, hidden, GH, layer.w_hh, packed_hh);
      if (layer.dx) pack_share(team, input, GH, layer.w_ih, packed_ih);
      if (projected) pack_share(team, cell, P, layer.w_hr, packed_hr);
      team.barrier();
      using Right = Packed<Element>;
      return run(team, Right{input, GH, packed_ih}, Right{hidden, GH, packed_hh}, Right{cell, P, packed_hr});
    }
    if constexpr (terms_in<Element> == 1) {
      using Right = UnpackedRows<Element>;
      const Right w_ih{input, GH, layer.w_ih, packed_ih}, w_hh{hidden, GH, layer.w_hh, packed_hh},
          w_hr{cell, P, layer.w_hr, packed_hr};
      if (team.rank == 0) {
        if (layer.dx) w_ih.pack_last(packed_ih);
        w_hh.pack_last(packed_hh);
        if (projected) w_hr.pack_last(packed_hr);
      }
      team.barrier();
      run(team, w_ih, w_hh, w_hr);
    }
  };
  run_team(plan.threads, body);
  workspace.release();
}

template <class Storage>
void layer_backward(const LayerBackward<Storage>& layer) {
  if (layer.shape.cell == Cell::lstm) return run_backward<LstmBackward<Storage>>(layer);
  with_rnn_cell(layer.shape.cell,
                [&](auto cell) { run_backward<RnnBackward<Storage, decltype(cell)>>(layer); });
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
