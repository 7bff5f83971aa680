// A layer forward: its plan, its memory, its weights, packed or where they lie, and a part for each thread.
//
// A chunk is as many steps as make a full block of rows for the projection; its pre-activations are then still in
// cache when the recurrence reads them (forward_part.h). Packed weights are kept for the next call (packs.h).
//
// With few rows a step is bound by reading W_hh from cache, and halving its bytes helps: a float layer may
// have it rounded to bfloat16. The sums are those of the same layer with such weights, to the last bit where H
// is even and the weights of both are packed, or those of neither.
#pragma once

#include "../dispatch.h"
#include "forward_part.h"
#include "packs.h"
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

  const auto element_bytes = [](Index count) { return Workspace::bytes_for<Element>(count); };
  const std::size_t packed_bytes =
      element_bytes(ih_count) + Workspace::bytes_for<Weight>(hh_count) + element_bytes(hr_count);
  Pack pack({layer.w_ih, layer.w_hh, layer.w_hr, shape.I, shape.H, shape.h_size(), gates, Vec<Element>::width,
             sizeof(Storage), parts_of<Element, Weight> == 2, plan.dense},
            layer.frozen, packed_bytes);
  const std::size_t own_bytes = pack.memory() ? 0 : packed_bytes;
  std::byte* own;
  Real *bias, *chunk_sums, *dense_sums;
  Storage* m;
  const Index bias_count = Index(Workspace::bytes_for<Real>(columns.count()) / sizeof(Real));  // of a thread
  Workspace& workspace = Workspace::with([&](auto&& take) {
    take(own, static_cast<Index>(own_bytes));
    take(bias, bias_count * plan.threads);
    take(chunk_sums, chunk_count);
    take(dense_sums, dense_count * plan.threads);
    take(m, m_count);
  });
  std::byte* packed = pack.memory() ? pack.memory() : own;
  auto* packed_ih = reinterpret_cast<Element*>(packed);
  auto* packed_hh = reinterpret_cast<Weight*>(packed + element_bytes(ih_count));
  auto* packed_hr = reinterpret_cast<Element*>(packed + element_bytes(ih_count) + Workspace::bytes_for<Weight>(hh_count));
  const auto prepare = [&](auto* array, Index columns) {
    prepare_for_writing(array, sizeof(*array) * std::size_t(shape.rows() * columns));
  };
  prepare(layer.y, shape.h_size());
  prepare(layer.c, shape.H);
  prepare(layer.gates, 4 * shape.H);
  prepare(layer.m, shape.H);

  run_team(plan.threads, [=, &pack](Team& team) {
    const LayerShape& shape = layer.shape;
    Real* own_bias = bias + team.rank * bias_count;
    add_biases(columns.count(), layer.b_ih, layer.b_hh, own_bias);
    const auto part = [&](const auto& w_ih, const auto& w_hh, const auto& w_hr) {
      ForwardPart(team, plan, layer, CellLayer{layer, own_bias, m}, w_ih, w_hh, w_hr, chunk_sums,
                  dense_sums + team.rank * dense_count)
          .run();
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
  });
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
