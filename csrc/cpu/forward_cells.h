// The cells of a layer forward.
#pragma once

#include "../cell.h"
#include "panels.h"
#include "vmath.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// The line that holds the end of a vector; the line of its beginning came with the vector before it.
template <class Storage>
RNNFAST_INLINE void prefetch_vector(const Storage* from) {
  __builtin_prefetch(from + Vec<RealOf<Storage>>::width - 1, 1);
}

// The cells of one step: `operator()` finishes one vector of hidden units of row b, whose sums have a vector
// for each gate; `prefetch` asks for the lines that it will use.
template <class Storage>
struct LstmCells {
  using Real = RealOf<Storage>;
  Index H;
  const Real* bias;
  Index carried;       // rows that come from the step before; the others begin
  const Real* c_prev;  // (carried, H)
  const Real* c0;      // (B, H)
  Real* c;             // (rows, H)
  Storage* h;          // (rows, H)
  Real* gates;         // (rows, 4, H); null: not kept

  RNNFAST_INLINE const Real* c_before(Index b) const { return b < carried ? c_prev : c0; }

  RNNFAST_INLINE void prefetch(Index b, Index unit) const {
    const Index at = b * H + unit;
    prefetch_vector(c_before(b) + at);
    prefetch_vector(c + at);
    prefetch_vector(h + at);
    if (!gates) return;
    for (Index gate = 0; gate < 4; ++gate) prefetch_vector(gates + (b * 4 + gate) * H + unit);
  }

  RNNFAST_INLINE void operator()(Index b, Index unit, Index lanes, const Real* sums) const {
    using V = Vec<Real>;
    const Index at = b * H + unit;
    const auto preactivation = [&](Index gate) RNNFAST_LAMBDA {
      return V::load(sums + gate * V::width) + V::load(bias + gate * H + unit, lanes);
    };
    LstmGates<V> gate{preactivation(0), preactivation(1), preactivation(2), preactivation(3)};
    V c_new, h_new;
    lstm_forward(gate, V::load(c_before(b) + at, lanes), c_new, h_new);
    if (gates) {
      Real* kept = gates + b * 4 * H + unit;
      gate.i.store(kept, lanes);
      gate.f.store(kept + H, lanes);
      gate.g.store(kept + 2 * H, lanes);
      gate.o.store(kept + 3 * H, lanes);
    }
    c_new.store(c + at, lanes);
    store(h_new, h + at, lanes);
  }
};

template <class Storage, class Nonlinearity>
struct RnnCells {
  using Real = RealOf<Storage>;
  Index H;
  const Real* bias;
  Storage* h;  // (rows, H)

  RNNFAST_INLINE void prefetch(Index b, Index unit) const { prefetch_vector(h + b * H + unit); }

  RNNFAST_INLINE void operator()(Index b, Index unit, Index lanes, const Real* sums) const {
    using V = Vec<Real>;
    const V a = V::load(sums) + V::load(bias + unit, lanes);
    store(Nonlinearity::forward(a), h + b * H + unit, lanes);
  }
};

// The layer as its recurrence sees it: the cells of a step.
template <class Storage>
struct LstmForward {
  using Real = RealOf<Storage>;
  static constexpr Index gates = 4;
  const LayerForward<Storage>& layer;
  const Real* bias;
  Storage* m;  // (B, H): the step's, where h is projected and m not kept

  // What is projected to the h of step t.
  Storage* projected(Index t) const {
    return layer.m ? layer.m + layer.shape.first_row(t) * layer.shape.H : m;
  }

  // Of step t, to which `carried` rows come from the step before it.
  LstmCells<Storage> cells(Index t, Index carried) const {
    const LayerShape& shape = layer.shape;
    const Index H = shape.H, first = shape.first_row(t) * H;
    const Index first_before = carried > 0 ? shape.first_row(shape.before(t)) * H : 0;
    Real* c_prev = layer.c ? layer.c + first_before : layer.c_n;
    Real* c = layer.c ? layer.c + first : layer.c_n;
    Real* gates = layer.gates ? layer.gates + 4 * first : nullptr;
    Storage* h = shape.projection > 0 ? projected(t) : layer.y + first;
    return {H, bias, carried, c_prev, layer.c0, c, h, gates};
  }
};

template <class Storage, class Nonlinearity>
struct RnnForward {
  using Real = RealOf<Storage>;
  static constexpr Index gates = 1;
  const LayerForward<Storage>& layer;
  const Real* bias;
  Storage* m;  // none

  Storage* projected(Index) const { return m; }

  RnnCells<Storage, Nonlinearity> cells(Index t, Index) const {
    return {layer.shape.H, bias, layer.y + layer.shape.first_row(t) * layer.shape.H};
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
