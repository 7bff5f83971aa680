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

template <class Real_, int gates_>
struct Forward {
  using Real = Real_;
  using State = StateOf<Real>;
  using Layer = RecurrenceForward<Real, State>;
  struct Carry {};
  static constexpr int gates = gates_;
  static constexpr int sums = gates;  // of a unit
  static constexpr bool has_state = gates == 4;

  const RecurrenceShape& shape;
  const Layer& layer;
  const Carry& carry;

  RNNFAST_DEVICE int terms() const { return int(shape.H); }

  // Weight row r of the packed matrix: the gates of a unit follow each other.
  RNNFAST_DEVICE Real weight(Index r, Index k) const {
    return layer.w_hh[(r % gates * shape.H + r / gates) * shape.H + k];
  }

  // What comes in at the first step.
  RNNFAST_DEVICE Real initial(Index column, Index k) const { return layer.h0[column * shape.H + k]; }

  // What is known of a column, whatever the step.
  static constexpr bool columns_are_simple = true;  // so that nobody need remember it
  struct Column {
    int b;
  };
  RNNFAST_DEVICE Column column(int index) const { return {index}; }

  // Of the T * B rows of an array, that of a column in a step.
  RNNFAST_DEVICE int row(int p, const Column& column) const {
    return (layer.reverse ? int(shape.T) - 1 - p : p) * int(shape.B) + column.b;
  }

  // Whether the step before sends a vector, and the row where it lies.
  RNNFAST_DEVICE bool arrives(int, const Column&) const { return true; }
  RNNFAST_DEVICE bool is_initial(int p) const { return p == 0; }
  RNNFAST_DEVICE int source_row(int p, const Column& column) const { return row(p - 1, column); }

  RNNFAST_DEVICE bool has_cell(int p, const Column&) const { return p < shape.T; }

  // The state of a unit that stays with its thread: c.
  RNNFAST_DEVICE State state_before(int begin, int column, int unit) const {
    return (begin == 0 ? layer.c0 : layer.c_n)[Index(column) * shape.H + unit];
  }
  RNNFAST_DEVICE void keep_state(int column, int unit, State c) const {
    layer.c_n[Index(column) * shape.H + unit] = c;
  }

  // What a cell reads that nobody writes during the launch, and where it stands.
  struct Inputs {
    int row, b;
    Real a[gates];
  };

  RNNFAST_DEVICE Inputs load(int p, const Column& column, int unit) const {
    const int H = int(shape.H);
    Inputs inputs;
    inputs.row = row(p, column);
    inputs.b = column.b;
    const Real* a = layer.a + Index(inputs.row) * (gates * H) + unit;
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate, a += H) inputs.a[gate] = *a;
    return inputs;
  }

  // put(k, number) hands number k of the vector to the next step; keeps: and that is not the output already.
  template <class Put>
  RNNFAST_DEVICE void finish(int p, int, int unit, const Inputs& in, const State (&sums)[gates], State& c,
                             bool keeps, Put&& put) const {
    using V = Number<State>;
    const int H = int(shape.H);
    const Index here = in.row;
    Real h;
    if constexpr (gates == 4) {
      LstmGates<V> gate{V(widen(in.a[0]) + sums[0]), V(widen(in.a[1]) + sums[1]), V(widen(in.a[2]) + sums[2]),
                        V(widen(in.a[3]) + sums[3])};
      V after(0), wide(0);
      lstm_forward(gate, V(c), after, wide);
      c = after.value;
      h = narrow<Real>(wide.value);
      put(unit, h);
      if (layer.c) layer.c[here * H + unit] = c;
      if (layer.gates) {
        Real* kept = layer.gates + here * (4 * H) + unit;
        kept[0] = narrow<Real>(gate.i.value);
        kept[H] = narrow<Real>(gate.f.value);
        kept[2 * H] = narrow<Real>(gate.g.value);
        kept[3 * H] = narrow<Real>(gate.o.value);
      }
    } else {
      h = narrow<Real>(rnn_forward(shape.cell, V(widen(in.a[0]) + sums[0])).value);
      put(unit, h);
    }
    if (keeps) layer.y[here * H + unit] = h;
    if (p == int(shape.T) - 1) layer.h_n[Index(in.b) * H + unit] = h;
  }
};

}  // namespace rnnfast::cuda
