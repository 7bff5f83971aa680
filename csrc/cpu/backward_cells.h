// The cells of a layer backward, and what they read and write at a step.
#pragma once

#include "forward_cells.h"
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

}  // namespace rnnfast::cpu::RNNFAST_ISA
