// A layer backward: the recurrence over time in reverse, and dx and the weight gradients as large products.
//
// The recurrence (recur_back.h) works on windows; a single one goes by in chunks of steps, recurrence and products in
// turn: da, the largest array of all, is then used while it is in cache, and never stored for the whole sequence. Gates
// that were not kept are computed again the same way, at the beginning of their chunk.
#pragma once

#include "forward.h"
#include "gemm.h"
#include "gradient.h"
#include "recompute.h"
#include "recur_back.h"

namespace rnnfast::cpu::RNNFAST_ISA {

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
    weight_gradients<Element>(team, layer.shape.h_size(), rows, dh_of,
                              GradientInput<Element, decltype(m_of)>{H, m_of, scratch.dw_hr},
                              GradientInput<Element, decltype(nothing_of)>{0, nothing_of, nullptr}, nullptr,
                              accumulate, blocks);
  }
  if (!layer.dw_ih && !layer.dw_hh) return;
  const auto x_of = [&](Index k) { return inputs.x(k); };
  const auto h_prev_of = [&](Index k) { return inputs.h_prev(k); };
  weight_gradients<Element>(
      team, GH, rows, da_of,
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
  Element *packed_ih, *packed_hh, *packed_hr;
  Real *dc_carry, *buffers;
  BackwardScratch<Storage> scratch{};
  Workspace& workspace = Workspace::with([&](auto&& take) {
    take(packed_ih, ih_count);
    take(packed_hh, hh_count);
    take(packed_hr, hr_count);
    take(scratch.zeros, GH);
    take(scratch.dh_start, starts * P);
    take(scratch.dc_start, starts * H);
    take(dc_carry, carry_count);
    take(scratch.da.rows, da_count);
    take(scratch.dh.rows, dh_count);
    take(scratch.gates.rows, gates_count);
    take(scratch.previous, N);
    recompute.lay_out(take);
    take(scratch.dw_ih, dw_ih_count);
    take(scratch.dw_hh, dw_hh_count);
    take(scratch.dw_hr, dw_hr_count);
    take(scratch.db, db_count);
    take(buffers, buffer_count * plan.threads);
  });
  scratch.da = {whole ? layer.da : scratch.da.rows, ring, GH};
  scratch.dh = {scratch.dh.rows, ring, P};
  scratch.gates = {scratch.gates.rows, chunk, GH};
  if constexpr (rounds) {
    scratch.sums = {layer.da_sums, N, GH};
    if (!layer.db) scratch.db = nullptr;
  } else {
    scratch.sums = scratch.da;
    if (!own_gates) scratch.gates = scratch.da;
    scratch.dw_ih = layer.dw_ih;
    scratch.dw_hh = layer.dw_hh;
    scratch.dw_hr = layer.dw_hr;
    scratch.db = layer.db;
  }
  recompute.prepare();
  std::fill(scratch.zeros, scratch.zeros + GH, Storage{});
  find_previous(shape, layer.y, layer.h0, scratch.previous);
  const auto prepare = [](auto* array, Index count) {
    prepare_for_writing(array, sizeof(*array) * std::size_t(count));
  };
  prepare(layer.dx, N * I);
  prepare(layer.dw_ih, GH * I);
  prepare(layer.dw_hh, GH * P);
  prepare(layer.dw_hr, P * H);
  prepare(layer.da, N * GH);
  prepare(layer.da_windows, 2 * window_rows * GH);
  prepare(layer.da_sums, N * GH);
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
