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

  // The weight by which a unit's sum takes term k. Row r of the packed matrix: the gates of a unit follow each other.
  RNNFAST_DEVICE Real weight(int unit, int sum, int k) const {
    return layer.w_hh[Index(sum * int(shape.H) + unit) * shape.H + k];
  }
  RNNFAST_DEVICE Real weight(Index r, Index k) const { return weight(int(r / gates), int(r % gates), int(k)); }

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

  // What a cell reads that nobody writes during the launch.
  struct Inputs {
    Real a[gates];
  };

  RNNFAST_DEVICE Inputs load(int p, const Column& column, int unit) const {
    const int H = int(shape.H);
    Inputs inputs;
    const Real* a = layer.a + Index(row(p, column)) * (gates * H) + unit;
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate, a += H) inputs.a[gate] = *a;
    return inputs;
  }

  struct Outputs {
    Real h;
    State gate[gates];  // LSTMs
  };

  RNNFAST_DEVICE Outputs compute(int, const Column&, int, const Inputs& in, const State (&sums)[gates],
                                 State& c) const {
    using V = Number<State>;
    Outputs out{};
    if constexpr (gates == 4) {
      LstmGates<V> gate{V(widen(in.a[0]) + sums[0]), V(widen(in.a[1]) + sums[1]), V(widen(in.a[2]) + sums[2]),
                        V(widen(in.a[3]) + sums[3])};
      V after(0), wide(0);
      lstm_forward(gate, V(c), after, wide);
      c = after.value;
      out.h = narrow<Real>(wide.value);
      out.gate[0] = gate.i.value;
      out.gate[1] = gate.f.value;
      out.gate[2] = gate.g.value;
      out.gate[3] = gate.o.value;
    } else {
      out.h = narrow<Real>(rnn_forward(shape.cell, V(widen(in.a[0]) + sums[0])).value);
    }
    return out;
  }

  // Whether a cell hands numbers to the next step, and put(k, number) for each.
  RNNFAST_DEVICE bool sends(int, const Column&) const { return true; }
  template <class Put>
  RNNFAST_DEVICE void for_each_sent(int unit, const Outputs& out, Put&& put) const {
    put(unit, out.h);
  }

  // keeps: what was handed on is not the output already.
  RNNFAST_DEVICE void store(int p, const Column& column, int, int unit, const Outputs& out, State c,
                            bool keeps) const {
    const int H = int(shape.H), row = this->row(p, column);
    const Index here = Index(row) * H + unit;
    if (keeps) layer.y[here] = out.h;
    if (p == int(shape.T) - 1) layer.h_n[Index(column.b) * H + unit] = out.h;
    if constexpr (gates == 4) {
      if (layer.c) layer.c[here] = c;
      if (!layer.gates) return;
      Real* kept = layer.gates + Index(row) * (4 * H) + unit;
      RNNFAST_UNROLL
      for (int gate = 0; gate < 4; ++gate, kept += H) *kept = narrow<Real>(out.gate[gate]);
    }
  }
};

}  // namespace rnnfast::cuda
