// A recurrence backward, as the kernel sees it. A column is a batch row of one truncation window, (j, b);
// step p = 0 takes every window to its last step, and one step further than the windows are long brings
// the gradient of the initial state. As in cpu/backward.h, windows of TBPTT(k, k) are a larger batch, and
// where windows overlap a step's da is their sum, added in the order of p: the windows of one batch row
// lie in one group then, and a barrier stands between any two that add to the same step.
#pragma once

#include "forward.h"

#include "../truncation.h"

namespace rnnfast::cuda {

template <class Real_, int gates_>
struct Backward {
  using Real = Real_;
  using State = StateOf<Real>;
  using Layer = RecurrenceBackward<Real, State>;
  static constexpr int gates = gates_;
  static constexpr int sums = 1;
  static constexpr bool has_state = gates == 4;

  // Memory between steps (plan.h, Scratch).
  struct Carry {
    State* dc;      // of a launch's last step
    State* starts;
  };

  const RecurrenceShape& shape;
  const Layer& layer;
  const Carry& carry;

  RNNFAST_DEVICE int terms() const { return gates * int(shape.H); }
  RNNFAST_DEVICE Real weight(Index r, Index k) const { return layer.w_hh[k * shape.H + r]; }
  RNNFAST_DEVICE Real initial(Index, Index) const { return Real{}; }  // a window begins with nothing

  RNNFAST_DEVICE bool overlapping() const { return shape.k2 > shape.k1; }

  static constexpr bool columns_are_simple = false;
  // A window's row: its batch row, the window's last step, and the steps [begin, end) whose losses are its own.
  struct alignas(16) Column {
    int b, last, begin, end;
  };
  RNNFAST_DEVICE Column column(int index) const {
    const Truncation windows{shape.T, shape.k1, shape.k2, layer.reverse};
    const int j = index / int(shape.B);
    return {index - j * int(shape.B), int(windows.window_begin(j) + shape.k2) - 1, int(windows.block_begin(j)),
            int(windows.block_end(j))};
  }

  // The step that a window is at in the kernel's step p.
  RNNFAST_DEVICE int step(int p, const Column& column) const { return column.last - p; }
  RNNFAST_DEVICE bool is_inside(int p, const Column& column) const {
    return p < int(shape.k2) && step(p, column) >= 0 && step(p, column) < column.end;
  }
  RNNFAST_DEVICE int row(int p, const Column& column) const {
    const int step = this->step(p, column);
    return (layer.reverse ? int(shape.T) - 1 - step : step) * int(shape.B) + column.b;
  }

  // The step after this one, if it lies in the window, sends its da.
  RNNFAST_DEVICE bool arrives(int p, const Column& column) const { return p > 0 && is_inside(p - 1, column); }
  RNNFAST_DEVICE bool is_initial(int) const { return false; }
  RNNFAST_DEVICE int source_row(int p, const Column& column) const { return row(p - 1, column); }

  // Windows at the start may be shorter than k2; each goes one step further, for the initial state.
  RNNFAST_DEVICE bool has_cell(int p, const Column& column) const {
    return p <= int(shape.k2) && step(p, column) >= -1;
  }

  // The state of a unit that stays with its thread: dc, on its way to the step before.
  RNNFAST_DEVICE State state_before(int begin, int column, int unit) const {
    return begin == 0 ? State(0) : carry.dc[Index(column) * shape.H + unit];
  }
  RNNFAST_DEVICE void keep_state(int column, int unit, State dc) const {
    carry.dc[Index(column) * shape.H + unit] = dc;
  }

  struct Inputs {
    int row;
    bool inside, starts, adds, ends;  // ends: what arrives is the gradient of the initial state
    State dh, dc;                     // that come from outside
    Real gate[gates];
    State c_prev, state;  // state: c, or an RNN's h
  };

  RNNFAST_DEVICE Inputs load(int p, const Column& column, int unit) const {
    Inputs in{};
    const int H = int(shape.H), step = this->step(p, column);
    in.inside = is_inside(p, column);
    in.ends = step == -1;
    if (!in.inside) return in;
    in.row = row(p, column);
    in.starts = step == column.end - 1;
    const Index here = Index(in.row) * H + unit;
    const bool counts = step >= column.begin, final = step == int(shape.T) - 1;
    in.adds = overlapping() && !counts;
    if (counts && layer.dy) in.dh = widen(layer.dy[here]);
    if (final && layer.dh_n) in.dh += widen(layer.dh_n[Index(column.b) * H + unit]);
    if constexpr (gates == 4) {
      if (counts && layer.dc) in.dc = layer.dc[here];
      if (final && layer.dc_n) in.dc += layer.dc_n[Index(column.b) * H + unit];
      const Index before = Index(layer.reverse ? shape.B : -shape.B) * H;
      in.c_prev = step == 0 ? layer.c0[Index(column.b) * H + unit] : layer.c[here + before];
      in.state = layer.c[here];
      const Real* from = layer.gates + Index(in.row) * (4 * H) + unit;
      RNNFAST_UNROLL
      for (int gate = 0; gate < 4; ++gate, from += H) in.gate[gate] = *from;
    } else {
      in.state = widen(layer.y[here]);
    }
    return in;
  }

  template <class Put>
  RNNFAST_DEVICE void finish(int, int index, int unit, const Inputs& in, const State (&sums)[1], State& dc_after,
                             bool keeps, Put&& put) const {
    using V = Number<State>;
    const int H = int(shape.H);
    if (!in.inside) {
      if (in.ends) carry.starts[Index(index) * H + unit] = sums[0];
      return;
    }
    const V dh(in.starts ? in.dh : in.dh + sums[0]);
    State da[gates];
    if constexpr (gates == 4) {
      const LstmGates<V> gate{V(widen(in.gate[0])), V(widen(in.gate[1])), V(widen(in.gate[2])),
                              V(widen(in.gate[3]))};
      V dc(in.starts ? in.dc : dc_after + in.dc);
      LstmGates<V> gradient{V(0), V(0), V(0), V(0)};
      lstm_backward(gate, V(in.c_prev), V(in.state), dh, dc, gradient);
      dc_after = dc.value;
      da[0] = gradient.i.value;
      da[1] = gradient.f.value;
      da[2] = gradient.g.value;
      da[3] = gradient.o.value;
    } else {
      da[0] = rnn_backward(shape.cell, V(in.state), dh).value;
    }
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate) put(gate * H + unit, narrow<Real>(da[gate]));
    if (!keeps) return;
    Real* kept = layer.da + Index(in.row) * (gates * H) + unit;
    // A step's own block comes first, then the later ones whose windows reach back to it.
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate, kept += H)
      *kept = narrow<Real>(in.adds ? widen(*kept) + da[gate] : da[gate]);
  }
};

}  // namespace rnnfast::cuda
