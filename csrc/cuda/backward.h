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
  static constexpr Pass pass = Pass::backward;
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
  RNNFAST_DEVICE Real weight(int unit, int, int k) const { return layer.w_hh[Index(k) * shape.H + unit]; }
  RNNFAST_DEVICE Real weight(Index r, Index k) const { return weight(int(r), 0, int(k)); }
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

  // As forward: from a step to the one before it.
  RNNFAST_DEVICE Index rows_on() const { return layer.reverse ? shape.B : -shape.B; }
  RNNFAST_DEVICE CellPlace place(int p, const Column& column, int unit) const {
    return place_of<gates>(row(p, column), shape.H, unit);
  }
  RNNFAST_DEVICE CellPlace places_on(int steps) const { return places_between<gates>(steps * rows_on(), shape.H); }

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

  // A window's last step, where nothing comes from behind; the step before its first one, where what arrives is the
  // gradient of the initial state; one before the window's own losses.
  RNNFAST_DEVICE bool starts(int p, const Column& column) const { return step(p, column) == column.end - 1; }
  RNNFAST_DEVICE bool ends(int p, const Column& column) const { return step(p, column) == -1; }
  RNNFAST_DEVICE bool counts(int p, const Column& column) const { return step(p, column) >= column.begin; }

  // Windows that do not overlap all begin with p = 0, but for one that may be shorter and begins later, and end together.
  static constexpr bool always_steady = false;
  RNNFAST_DEVICE int steady_begin() const {
    const Truncation windows{shape.T, shape.k1, shape.k2, layer.reverse};
    return overlapping() ? int(shape.k2) : int(windows.blocks() * shape.k1 - shape.T) + 1;
  }
  RNNFAST_DEVICE bool is_steady(int p, int begin) const { return p >= begin && p + 1 < int(shape.k2); }

  // As they lie in memory: to convert a number is to wait for it.
  struct Inputs {
    Real dy, dh_n;
    State dc, dc_n;  // of every step's cell state, and of the last one's
    Real gate[gates];
    State c_prev, c;
    Real y;
  };

  template <bool steady>
  RNNFAST_DEVICE Inputs load(int p, const Column& column, int unit, const CellPlace& place) const {
    Inputs in{};
    if (!steady && !is_inside(p, column)) return in;
    const bool counts = steady || this->counts(p, column), final = !steady && step(p, column) == int(shape.T) - 1;
    const Index of_state = Index(column.b) * shape.H + unit;
    if (counts && layer.dy) in.dy = layer.dy[place.unit];
    if (final && layer.dh_n) in.dh_n = layer.dh_n[of_state];
    if constexpr (gates == 4) {
      if (counts && layer.dc) in.dc = layer.dc[place.unit];
      if (final && layer.dc_n) in.dc_n = layer.dc_n[of_state];
      const State* before = layer.c + (place.unit + rows_on() * shape.H);
      if (!steady && step(p, column) == 0) before = layer.c0 + of_state;
      in.c_prev = *before;
      in.c = layer.c[place.unit];
      const Real* from = layer.gates + place.gates;
      RNNFAST_UNROLL
      for (int gate = 0; gate < 4; ++gate, from += int(shape.H)) in.gate[gate] = *from;
    } else {
      in.y = layer.y[place.unit];
    }
    return in;
  }

  RNNFAST_DEVICE void request(const CellPlace& place) const {
    if (layer.dy) prefetch(layer.dy + place.unit);
    if constexpr (gates == 4) {
      prefetch(layer.c + place.unit);
      const Real* from = layer.gates + place.gates;
      RNNFAST_UNROLL
      for (int gate = 0; gate < 4; ++gate, from += int(shape.H)) prefetch(from);
    } else {
      prefetch(layer.y + place.unit);
    }
  }

  struct Outputs {
    State da[gates];
    State end;  // what arrives at the initial state
  };

  template <bool steady>
  RNNFAST_DEVICE Outputs compute(int p, const Column& column, const Inputs& in, const State (&sums)[1],
                                 State& dc_after) const {
    using V = Number<State>;
    Outputs out{};
    out.end = sums[0];
    if (!steady && !is_inside(p, column)) return out;
    const bool starts = !steady && this->starts(p, column);
    const State outer = steady ? widen(in.dy) : widen(in.dy) + widen(in.dh_n);
    const V dh(starts ? outer : outer + sums[0]);
    if constexpr (gates == 4) {
      const LstmGates<V> gate{V(widen(in.gate[0])), V(widen(in.gate[1])), V(widen(in.gate[2])),
                              V(widen(in.gate[3]))};
      const State outer_dc = steady ? in.dc : in.dc + in.dc_n;
      V dc(starts ? outer_dc : dc_after + outer_dc);
      LstmGates<V> gradient{V(0), V(0), V(0), V(0)};
      lstm_backward(gate, V(in.c_prev), V(in.c), dh, dc, gradient);
      dc_after = dc.value;
      out.da[0] = gradient.i.value;
      out.da[1] = gradient.f.value;
      out.da[2] = gradient.g.value;
      out.da[3] = gradient.o.value;
    } else {
      out.da[0] = rnn_backward(shape.cell, V(widen(in.y)), dh).value;
    }
    return out;
  }

  static constexpr int sent = gates;
  RNNFAST_DEVICE bool sends(int p, const Column& column) const { return is_inside(p, column); }
  template <class Put>
  RNNFAST_DEVICE void for_each_sent(int unit, const Outputs& out, Put&& put) const {
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate) put(gate * int(shape.H) + unit, narrow<Real>(out.da[gate]));
  }

  template <bool steady>
  RNNFAST_DEVICE void store(int p, const Column& column, int index, int unit, const CellPlace& place,
                            const Outputs& out, State, bool keeps) const {
    if (!steady && ends(p, column)) carry.starts[Index(index) * shape.H + unit] = out.end;
    if (!keeps || (!steady && !is_inside(p, column))) return;
    Real* kept = layer.da + place.gates;
    const bool adds = !steady && overlapping() && !counts(p, column);
    // A step's own block comes first, then the later ones whose windows reach back to it.
    RNNFAST_UNROLL
    for (int gate = 0; gate < gates; ++gate, kept += int(shape.H))
      *kept = narrow<Real>(adds ? widen(*kept) + out.da[gate] : out.da[gate]);
  }

  RNNFAST_DEVICE void finish(const Column&, int, const Outputs&) const {}
};

}  // namespace rnnfast::cuda
