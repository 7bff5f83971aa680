// A recurrence forward, as the kernel sees it: which vector a column brings to a step, and how the sums of a
// unit end it. Steps p are counted in processing order; a column is a batch row.
#pragma once

#include "number.h"
#include "plan.h"

#include "../rnnfast.h"

namespace rnnfast::cuda {

// The cell maths of an RNN, chosen at run time, as that is cheaper than a kernel for each. Without a branch, so that a
// lane's cells go side by side; but for tanh in double precision, which is long.
template <class State>
RNNFAST_DEVICE Number<State> rnn_forward(Cell cell, Number<State> a) {
  if (sizeof(State) == 8) return cell == Cell::rnn_relu ? ReluCell::forward(a) : TanhCell::forward(a);
  const Number<State> relu = ReluCell::forward(a), tanh = TanhCell::forward(a);
  return cell == Cell::rnn_relu ? relu : tanh;
}

template <class State>
RNNFAST_DEVICE Number<State> rnn_backward(Cell cell, Number<State> h, Number<State> dh) {
  const Number<State> relu = ReluCell::backward(h, dh), tanh = TanhCell::backward(h, dh);
  return cell == Cell::rnn_relu ? relu : tanh;
}

// Where a cell's numbers lie in arrays of (T * B, H) and of (T * B, G*H).
struct CellPlace {
  Index unit, gates;

  // Of a unit so much further; of another step.
  RNNFAST_ANYWHERE CellPlace operator+(int units) const { return {unit + units, gates + units}; }
  RNNFAST_ANYWHERE CellPlace operator+(const CellPlace& on) const { return {unit + on.unit, gates + on.gates}; }
};

template <int gates>
RNNFAST_DEVICE CellPlace place_of(Index row, Index H, int unit) {
  return {row * H + unit, row * (gates * H) + unit};
}
// How far it is from a step's places to those of another, so many rows on.
template <int gates>
RNNFAST_DEVICE CellPlace places_between(Index rows, Index H) {
  return {computed_once(rows * H), computed_once(rows * (gates * H))};
}

// body(std::true_type or false_type): the one for steady steps, and the one for any.
template <class Step, class Body>
RNNFAST_DEVICE void with_steadiness(const Step& step, int p, int begin, Body&& body) {
  if (Step::always_steady || step.is_steady(p, begin)) {
    body(std::true_type{});
  } else if constexpr (!Step::always_steady) {
    body(std::false_type{});
  }
}

template <class Real_, int gates_>
struct Forward {
  using Real = Real_;
  using State = StateOf<Real>;
  using Layer = RecurrenceForward<Real, State>;
  struct Carry {};
  static constexpr Pass pass = Pass::forward;
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

  // Rows from a step to the next one.
  RNNFAST_DEVICE Index rows_on() const { return layer.reverse ? -shape.B : shape.B; }
  RNNFAST_DEVICE CellPlace place(int p, const Column& column, int unit) const {
    return place_of<gates>(row(p, column), shape.H, unit);
  }
  RNNFAST_DEVICE CellPlace places_on(int steps) const { return places_between<gates>(steps * rows_on(), shape.H); }

  // Whether the step before sends a vector, and the row where it lies.
  RNNFAST_DEVICE bool arrives(int, const Column&) const { return true; }
  RNNFAST_DEVICE bool is_initial(int p) const { return p == 0; }
  RNNFAST_DEVICE int source_row(int p, const Column& column) const { return row(p - 1, column); }

  RNNFAST_DEVICE bool has_cell(int p, const Column&) const { return p < int(shape.T); }

  // The state of a unit that stays with its thread: c.
  RNNFAST_DEVICE State state_before(int begin, int column, int unit) const {
    return (begin == 0 ? layer.c0 : layer.c_n)[Index(column) * shape.H + unit];
  }
  RNNFAST_DEVICE void keep_state(int column, int unit, State c) const {
    layer.c_n[Index(column) * shape.H + unit] = c;
  }

  // Steady is a step in which no column begins or ends anything: load, compute and store need not ask then.
  static constexpr bool always_steady = true;
  RNNFAST_DEVICE int steady_begin() const { return 0; }
  RNNFAST_DEVICE bool is_steady(int, int) const { return true; }

  // What a cell reads that nobody writes during the launch.
  struct Inputs {
    Real a[gates];
  };

  template <bool steady>
  RNNFAST_DEVICE Inputs load(int, const Column&, int, const CellPlace& place) const {
    Inputs inputs;
    const Real* a = layer.a + place.gates;
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate, a += int(shape.H)) inputs.a[gate] = *a;
    return inputs;
  }

  // Asks for what a later step will load.
  RNNFAST_DEVICE void request(const CellPlace& place) const {
    const Real* a = layer.a + place.gates;
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate, a += int(shape.H)) prefetch(a);
  }

  struct Outputs {
    Real h;
    State gate[gates];  // LSTMs
  };

  template <bool steady>
  RNNFAST_DEVICE Outputs compute(int, const Column&, const Inputs& in, const State (&sums)[gates],
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

  static constexpr int sent = 1;  // numbers of a cell in the next step's vector, H apart
  // Whether a cell hands numbers to the next step, and put(k, number) for each.
  RNNFAST_DEVICE bool sends(int, const Column&) const { return true; }
  template <class Put>
  RNNFAST_DEVICE void for_each_sent(int unit, const Outputs& out, Put&& put) const {
    put(unit, out.h);
  }

  // keeps: what was handed on is not the output already.
  template <bool steady>
  RNNFAST_DEVICE void store(int, const Column&, int, int, const CellPlace& place, const Outputs& out, State c,
                            bool keeps) const {
    if (keeps) layer.y[place.unit] = out.h;
    if constexpr (gates == 4) {
      if (layer.c) layer.c[place.unit] = c;
      if (!layer.gates) return;
      Real* kept = layer.gates + place.gates;
      RNNFAST_UNROLL
      for (int gate = 0; gate < 4; ++gate, kept += int(shape.H)) *kept = narrow<Real>(out.gate[gate]);
    }
  }

  // What is left after a launch's last step.
  RNNFAST_DEVICE void finish(const Column& column, int unit, const Outputs& out) const {
    layer.h_n[Index(column.b) * shape.H + unit] = out.h;
  }
};

}  // namespace rnnfast::cuda
