// A layer forward: the projection of a chunk of steps, then the recurrence over them, chunk by chunk.
//
// A chunk is as many steps as make a full block of rows for the projection; its pre-activations are then
// still in cache when the recurrence reads them. A thread projects exactly the rows, or the hidden units,
// whose recurrence it computes, so the only hand-over between threads is h, once a step, and there is
// none where threads own batch rows; or one thread computes the recurrence, and the others project the next chunk for
// it. Packed weights are kept for the next call (packs.h).
//
// A projected h takes one product more a step, of what the cells give, and one hand-over more.
//
// With few rows a step is bound by reading W_hh from cache, and halving its bytes helps: a float layer may
// have it rounded to bfloat16. The sums are those of the same layer with such weights, to the last bit where H
// is even and the weights of both are packed, or those of neither.
#pragma once

#include "../dispatch.h"
#include "forward_cells.h"
#include "gemm.h"
#include "packs.h"
#include "steps.h"
#include "sums.h"
#include "unpacked.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// W_hh is kept as Weight; unpacked, one that is kept rounded is rounded at each use, and packing it pays sooner.
template <class Element, class Weight = Element>
Engine engine() {
  Engine engine{Vec<Element>::width, sizeof(Element),   tile_rows,        row_block,
                l1_cache_bytes(),    l2_cache_bytes(), terms_in<Element>};
  if (!std::is_same_v<Element, Weight>) engine.packing_pays = 5;
  return engine;
}

// Adds up the biases; absent ones are zero.
template <class Storage>
void add_biases(Index count, const Storage* b_ih, const Storage* b_hh, RealOf<Storage>* sum) {
  using Real = RealOf<Storage>;
  for (Index n = 0; n < count; ++n)
    sum[n] = (b_ih ? load(b_ih + n) : Real(0)) + (b_hh ? load(b_hh + n) : Real(0));
}

// One thread's part of the whole layer; Input and Hidden are how the weights are laid out.
template <class Storage, class CellLayer, class Input, class Hidden>
void forward_part(Team& team, const Plan& plan, const LayerForward<Storage>& layer,
                  const CellLayer& cell_layer, const Input& w_ih, const Hidden& w_hh, const Input& w_hr,
                  RealOf<Storage>* sums, RealOf<Storage>* dense_sums) {
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;
  constexpr Index width = Vec<Real>::width;
  constexpr Index gates = CellLayer::gates;
  const LayerShape& shape = layer.shape;
  const Index T = shape.T, I = shape.I, H = shape.H, P = shape.h_size();
  const bool units_shared = plan.split == Split::units, steps_shared = plan.split == Split::steps;
  const bool recurs = !steps_shared || team.rank == 0;
  const Columns<Element>& columns = w_hh.columns;
  const DenseSums<Element> dense{w_ih.columns, H, dense_sums};
  const Part part = part_of(team, plan, layer, columns.unit_vectors());
  const auto own_rows = [&](Index t) { return overlap({0, shape.rows_at(t)}, part.rows); };
  const auto rows_of = [&](Index p) { return own_rows(shape.time(p)); };
  const auto count_rows = [&](Range steps) {
    Index rows = 0;
    for (Index p = steps.begin; p < steps.end; ++p) rows += rows_of(p).size();
    return rows;
  };
  using Sums = ChunkSums<Element>;
  Sums chunk_sums = Sums::of(columns, team, plan, shape, part.rows, sums), next_sums = chunk_sums;
  if (steps_shared) next_sums.first += Sums::size(columns, chunk_sums.rows);
  const auto chunk_from = [&](Index begin) {
    if (begin == T) return Range{T, T};
    return Range{begin, begin + steps_within(chunk_sums.rows, T - begin,
                                             [&](Index n) { return rows_of(begin + n).size(); })};
  };

  // The projection of steps, whose rows are those from m on of their chunk.
  const auto project = [&](Range steps, Index m, const Sums& chunk) {
    for_each_block(steps, rows_of, [&](Index count, const GroupRow* rows) {
      const Element* in[row_block];
      for (Index r = 0; r < count; ++r)
        in[r] = as_elements(layer.x + (shape.first_row(shape.time(rows[r].group)) + rows[r].row) * I);
      const Range vectors = plan.dense ? Range{0, w_ih.columns.unit_vectors()} : part.unit_vectors;
      for_each_piece(w_ih.columns, vectors, false, [&](const Piece& piece) {
        Real* to[row_block];
        for (Index r = 0; r < count; ++r) to[r] = plan.dense ? dense.row(piece, r) : chunk.row(piece, m + r);
        w_ih.multiply(count, piece, in, {to, width, false});
      });
      if (plan.dense)
        for (Index r = 0; r < count; ++r) dense.spread(r, columns, chunk, m + r);
      m += count;
    });
  };
  // This thread's part of the projection of a chunk, of which the first thread does so much.
  const auto project_share = [&](Range chunk, double first_share, const Sums& to) {
    if (!steps_shared) return project(chunk, 0, to);
    const Index first = team.size > 1 ? Index(first_share * double(chunk.size())) : chunk.size();
    Range own{chunk.begin, chunk.begin + first};
    if (team.rank > 0) {
      const Range others = share(chunk.size() - first, team.rank - 1, team.size - 1);
      own = {own.end + others.begin, own.end + others.end};
    }
    project(own, count_rows({chunk.begin, own.begin}), to);
  };

  // The recurrence of step p, whose rows are those from m on of its chunk.
  const auto step = [&](Index p, Index m, const Sums& chunk) {
    const Index t = shape.time(p), t_prev = shape.before(t);
    const Index carried = std::min(shape.rows_at(t_prev), shape.rows_at(t));
    const auto cells = cell_layer.cells(t, carried);
    const Storage* previous = carried > 0 ? layer.y + shape.first_row(t_prev) * P : nullptr;
    const Range rows = own_rows(t);
    const Index blocks = ceil_div(rows.size(), row_block);
    for (Index block = 0; block < blocks; ++block) {
      const Range own = share(rows.size(), block, blocks);
      const Index first = rows.begin + own.begin;
      const Element* a[row_block];
      for (Index r = 0; r < own.size(); ++r)
        a[r] = as_elements((first + r < carried ? previous : layer.h0) + (first + r) * P);
      for_each_piece(columns, part.unit_vectors, p % 2 == 1, [&](const Piece& piece) {
        Real* to[row_block];
        for (Index r = 0; r < own.size(); ++r) to[r] = chunk.row(piece, m + own.begin + r);
        const auto for_each_cell = [&](auto&& visit) RNNFAST_LAMBDA {
          for (Index v = 0; v < piece.vectors; v += gates) {
            const Index unit = columns.unit_vector(piece.panel, piece.first + v) * width;
            for (Index r = 0; r < own.size(); ++r) visit(r, v, unit);
          }
        };
        for_each_cell([&](Index r, Index, Index unit) RNNFAST_LAMBDA { cells.prefetch(first + r, unit); });
        w_hh.multiply(own.size(), piece, a, {to, width, true});
        for_each_cell([&](Index r, Index v, Index unit) RNNFAST_LAMBDA {
          const Real* sum = to[r] + v * width;
          if (H - unit >= width)
            cells(first + r, unit, width, sum);
          else
            cells(first + r, unit, H - unit, sum);
        });
      });
    }
    if (shape.projection > 0) {
      if (units_shared) team.barrier();
      const Index vectors = w_hr.columns.unit_vectors();
      const Storage* from = cell_layer.projected(t) + rows.begin * H;
      Storage* h = layer.y + (shape.first_row(t) + rows.begin) * P;
      multiply_rows<Element>(
          rows.size(), [&](Index r) { return from + r * H; }, w_hr,
          units_shared ? team.share(vectors) : Range{0, vectors}, [&](Index r) { return h + r * P; });
    }
    if (units_shared && (p + 1 < T || shape.projection > 0)) team.barrier();
  };

  Range chunk = chunk_from(0);
  project_share(chunk, 1 / double(team.size), chunk_sums);
  while (chunk.size() > 0) {
    if (steps_shared) team.barrier();  // everybody's part of the chunk is there
    const Range next = chunk_from(chunk.end);
    if (recurs) {
      Index m = 0;
      for (Index p = chunk.begin; p < chunk.end; ++p) {
        step(p, m, chunk_sums);
        m += rows_of(p).size();
      }
    }
    project_share(next, plan.own_share, next_sums);
    std::swap(chunk_sums, next_sums);
    chunk = next;
  }
  if (!recurs) return;
  // Each sequence's last states, as far as this thread made them; a projected h is there for everybody.
  const Range units{part.unit_vectors.begin * width, std::min(part.unit_vectors.end * width, H)};
  const Range of_h = shape.projection > 0 ? (units_shared ? team.share(P) : Range{0, P}) : units;
  for (Index t = 0; t < T; ++t) {
    const Range ended = overlap({shape.rows_at(shape.after(t)), shape.rows_at(t)}, part.rows);
    for (Index b = ended.begin; b < ended.end; ++b) {
      const Index row = shape.first_row(t) + b;
      if (layer.h_n)
        std::copy_n(layer.y + row * P + of_h.begin, of_h.size(), layer.h_n + b * P + of_h.begin);
      if (layer.c) std::copy_n(layer.c + row * H + units.begin, units.size(), layer.c_n + b * H + units.begin);
    }
  }
}

// Weight is what W_hh is kept as.
template <class CellLayer, class Weight, class Storage>
void run_forward(const LayerForward<Storage>& layer) {
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;
  constexpr Index gates = CellLayer::gates;
  const LayerShape& shape = layer.shape;
  const Columns<Element> columns{shape.H, gates};
  const Plan plan = plan_forward(shape, engine<Element, Weight>(), layer.frozen != 0);
  const Columns<Element> ih_columns = plan.dense ? Columns<Element>{columns.count(), 1} : columns;
  const Columns<Element> hr_columns{shape.projection, 1};
  const Index ih_count = plan.pack ? Packed<Element>::size(ih_columns, shape.I) : 0;
  const Index hh_count = plan.pack ? Packed<Element, Weight>::size(columns, shape.h_size()) : 0;
  const Index hr_count = plan.pack ? Packed<Element>::size(hr_columns, shape.H) : 0;
  const Index m_count = shape.projection > 0 && !layer.m ? shape.B * shape.H : 0;
  const Index chunk_count = ChunkSums<Element>::size(columns, plan, shape);
  const Index dense_count = plan.dense ? DenseSums<Element>::size(ih_columns) : 0;  // of a thread

  const auto bytes = [](Index count) { return Workspace::bytes_for<Real>(count); };
  const auto element_bytes = [](Index count) { return Workspace::bytes_for<Element>(count); };
  const std::size_t packed_bytes =
      element_bytes(ih_count) + Workspace::bytes_for<Weight>(hh_count) + element_bytes(hr_count);
  Pack pack({layer.w_ih, layer.w_hh, layer.w_hr, shape.I, shape.H, shape.h_size(), gates, Vec<Element>::width,
             sizeof(Storage), parts_of<Element, Weight> == 2, plan.dense},
            layer.frozen, packed_bytes);
  const std::size_t own_bytes = pack.memory() ? 0 : packed_bytes;
  Workspace& workspace =
      Workspace::with_room(own_bytes + bytes(columns.count()) + bytes(chunk_count) +
                           bytes(dense_count * plan.threads) + Workspace::bytes_for<Storage>(m_count));
  auto* own = workspace.take<std::byte>(static_cast<Index>(own_bytes));
  std::byte* packed = pack.memory() ? pack.memory() : own;
  auto* packed_ih = reinterpret_cast<Element*>(packed);
  auto* packed_hh = reinterpret_cast<Weight*>(packed + element_bytes(ih_count));
  auto* packed_hr = reinterpret_cast<Element*>(packed + element_bytes(ih_count) + Workspace::bytes_for<Weight>(hh_count));
  Real* bias = workspace.take<Real>(columns.count());
  Real* chunk_sums = workspace.take<Real>(chunk_count);
  Real* dense_sums = workspace.take<Real>(dense_count * plan.threads);
  auto* m = workspace.take<Storage>(m_count);
  add_biases(columns.count(), layer.b_ih, layer.b_hh, bias);
  const auto prepare = [&](auto* array, Index columns) {
    prepare_for_writing(array, sizeof(*array) * std::size_t(shape.rows() * columns));
  };
  prepare(layer.y, shape.h_size());
  prepare(layer.c, shape.H);
  prepare(layer.gates, 4 * shape.H);
  prepare(layer.m, shape.H);

  auto body = [&](Team& team) {
    const auto part = [&](const auto& w_ih, const auto& w_hh, const auto& w_hr) {
      forward_part(team, plan, layer, CellLayer{layer, bias, m}, w_ih, w_hh, w_hr, chunk_sums,
                   dense_sums + team.rank * dense_count);
    };
    if (!plan.pack)
      return part(UnpackedColumns<Element>{columns, shape.I, layer.w_ih},
                  UnpackedColumns<Element, Weight>{columns, shape.h_size(), layer.w_hh},
                  UnpackedColumns<Element>{hr_columns, shape.H, layer.w_hr});
    pack.refresh(team, [&] {
      pack_columns(ih_columns, team.share(ih_columns.panels()), shape.I, layer.w_ih, packed_ih);
      pack_columns(columns, team.share(columns.panels()), shape.h_size(), layer.w_hh, packed_hh);
      pack_columns(hr_columns, team.share(hr_columns.panels()), shape.H, layer.w_hr, packed_hr);
    });
    part(Packed<Element>{ih_columns, shape.I, packed_ih},
         Packed<Element, Weight>{columns, shape.h_size(), packed_hh},
         Packed<Element>{hr_columns, shape.H, packed_hr});
  };
  run_team(plan.threads, body);
  pack.settle();
  workspace.release();
}

template <class Storage>
void layer_forward(const LayerForward<Storage>& layer) {
  if (layer.shape.T == 0 || layer.shape.B == 0) return;
  const auto run = [&](auto weight) {
    using Weight = decltype(weight);
    if (layer.shape.cell == Cell::lstm) return run_forward<LstmForward<Storage>, Weight>(layer);
    with_rnn_cell(layer.shape.cell,
                  [&](auto cell) { run_forward<RnnForward<Storage, decltype(cell)>, Weight>(layer); });
  };
  if constexpr (std::is_same_v<Storage, float>)
    if (layer.halve_w_hh) return run(Pair{});
  run(ElementOf<Storage>{});
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
