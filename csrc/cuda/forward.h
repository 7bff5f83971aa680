// A recurrence forward, as the kernel sees it: which vector a column brings to a step, and how the sums of a
// unit end it. Steps p are counted in processing order; a column is a batch row.
#pragma once

#include "number.h"
#include "plan.h"

#include "../rnnfast.h"

namespace rnnfast::cuda {

// The cell maths of an RNN, chosen at run time: a branch a cell is cheaper than a kernel for each.
template <class V>
RNNFAST_DEVICE V rnn_forward(Cell cell, V a) {
  return cell == Cell::rnn_relu ? ReluCell::forward(a) : TanhCell::forward(a);
}

template <class V>
RNNFAST_DEVICE V rnn_backward(Cell cell, V h, V dh) {
  return cell == Cell::rnn_relu ? ReluCell::backward(h, dh) : TanhCell::backward(h, dh);
}

template <class Real_>
struct Forward {
  using Real = Real_;
  using State = StateOf<Real>;
  using Layer = RecurrenceForward<Real, State>;
  struct Carry {};

  const RecurrenceShape& shape;
  const Layer& layer;
  const Carry& carry;

  RNNFAST_DEVICE Index terms() const { return shape.H; }
  RNNFAST_DEVICE int sums() const { return int(gate_count(shape.cell)); }  // of a unit

  // Weight row r of the packed matrix: the gates of a unit follow each other.
  RNNFAST_DEVICE Real weight(Index r, Index k) const {
    const Index G = gate_count(shape.cell);
    return layer.w_hh[(r % G * shape.H + r / G) * shape.H + k];
  }

  RNNFAST_DEVICE Index row(int p, int column) const {
    return (layer.reverse ? shape.T - 1 - p : Index(p)) * shape.B + column;
  }

  RNNFAST_DEVICE bool arrives(int, int) const { return true; }
  RNNFAST_DEVICE const Real* source(int p, int column) const {
    return p == 0 ? layer.h0 + column * shape.H : layer.y + row(p - 1, column) * shape.H;
  }
  RNNFAST_DEVICE Real* target(int p, int column) const { return layer.y + row(p, column) * shape.H; }

  // The state of a unit that stays with its thread: c.
  RNNFAST_DEVICE State state_before(int begin, int column, int unit) const {
    return (begin == 0 ? layer.c0 : layer.c_n)[column * shape.H + unit];
  }
  RNNFAST_DEVICE void keep_state(int column, int unit, State c) const {
    layer.c_n[column * shape.H + unit] = c;
  }

  static constexpr int cells_ahead = 2;  // of a thread, whose inputs are loaded a step ahead

  // What a cell reads that nobody writes during the launch.
  struct Inputs {
    State a[4];
  };

  RNNFAST_DEVICE Inputs load(int p, int column, int unit) const {
    const Index H = shape.H, G = gate_count(shape.cell);
    const Real* a = layer.a + row(p, column) * G * H + unit;
    Inputs inputs{};
    RNNFAST_UNROLL
    for (int gate = 0; gate < 4; ++gate)
      if (gate < G) inputs.a[gate] = widen(a[gate * H]);
    return inputs;
  }

  // put(k, number) hands number k of the vector to the next step.
  template <class Put>
  RNNFAST_DEVICE void finish(int p, int column, int unit, const Inputs& in, const State (&sums)[4], State& c,
                             Put&& put) const {
    using V = Number<State>;
    const Index H = shape.H, here = row(p, column);
    Real h;
    if (shape.cell == Cell::lstm) {
      LstmGates<V> gate{V(in.a[0] + sums[0]), V(in.a[1] + sums[1]), V(in.a[2] + sums[2]),
                        V(in.a[3] + sums[3])};
      V after(0), wide(0);
      lstm_forward(gate, V(c), after, wide);
      c = after.value;
      h = narrow<Real>(wide.value);
      put(unit, h);
      if (layer.c) layer.c[here * H + unit] = c;
      if (layer.gates) {
        Real* gates = layer.gates + here * 4 * H + unit;
        gates[0] = narrow<Real>(gate.i.value);
        gates[H] = narrow<Real>(gate.f.value);
        gates[2 * H] = narrow<Real>(gate.g.value);
        gates[3 * H] = narrow<Real>(gate.o.value);
      }
    } else {
      h = narrow<Real>(rnn_forward(shape.cell, V(in.a[0] + sums[0])).value);
      put(unit, h);
    }
    if (p == shape.T - 1) layer.h_n[column * H + unit] = h;
  }

  RNNFAST_DEVICE bool has_cell(int p, int) const { return p < shape.T; }
};

}  // namespace rnnfast::cuda
