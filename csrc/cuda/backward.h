// A recurrence backward, as the kernel sees it. A column is a batch row of one truncation window, (j, b);
// step p = 0 takes every window to its last step, and one step further than the windows are long brings
// the gradient of the initial state. As in cpu/backward.h, windows of TBPTT(k, k) are a larger batch, and
// where windows overlap a step's da is their sum, added in the order of p: the windows of one batch row
// lie in one group then, and a barrier stands between any two that add to the same step.
#pragma once

#include "forward.h"

#include "../truncation.h"

namespace rnnfast::cuda {

template <class Real_>
struct Backward {
  using Real = Real_;
  using State = StateOf<Real>;
  using Layer = RecurrenceBackward<Real, State>;

  // Memory between steps (plan.h, Scratch).
  struct Carry {
    State* dc;      // of a launch's last step
    State* starts;
    Real* windows;
  };

  const RecurrenceShape& shape;
  const Layer& layer;
  const Carry& carry;

  RNNFAST_DEVICE Index terms() const { return gate_count(shape.cell) * shape.H; }
  RNNFAST_DEVICE int sums() const { return 1; }
  RNNFAST_DEVICE Real weight(Index r, Index k) const { return layer.w_hh[k * shape.H + r]; }

  RNNFAST_DEVICE Truncation truncation() const {
    return {shape.T, shape.k1, shape.k2, layer.reverse};
  }
  RNNFAST_DEVICE bool overlapping() const { return shape.k2 > shape.k1; }

  // Where a window's row stands at a kernel step.
  struct At {
    int step, t;  // in processing order, and in the arrays
    int b;
    bool inside, counts, starts, final;
  };

  RNNFAST_DEVICE At at(int p, int column) const {
    const Truncation windows = truncation();
    const int j = column / int(shape.B);
    const int step = int(windows.window_begin(j) + shape.k2) - 1 - p;
    const Index end = windows.block_end(j);
    return {step,
            int(windows.time(step)),
            column - j * int(shape.B),
            p < shape.k2 && step >= 0 && step < end,
            step >= windows.block_begin(j),
            step == end - 1,
            step == shape.T - 1};
  }

  // The step after this one, if it lies in the window, sends its da.
  RNNFAST_DEVICE bool arrives(int p, int column) const { return p > 0 && at(p - 1, column).inside; }
  RNNFAST_DEVICE const Real* source(int p, int column) const { return target(p - 1, column); }
  RNNFAST_DEVICE Real* target(int p, int column) const {
    const Index columns = truncation().blocks() * shape.B;
    if (overlapping()) return carry.windows + (p % 2 * columns + column) * terms();
    const At here = at(p, column);
    return layer.da + (here.t * shape.B + here.b) * terms();
  }

  // The state of a unit that stays with its thread: dc, on its way to the step before.
  RNNFAST_DEVICE State state_before(int begin, int column, int unit) const {
    return begin == 0 ? State(0) : carry.dc[column * shape.H + unit];
  }
  RNNFAST_DEVICE void keep_state(int column, int unit, State dc) const {
    carry.dc[column * shape.H + unit] = dc;
  }

  static constexpr int cells_ahead = 1;  // of a thread, whose inputs are loaded a step ahead

  struct Inputs {
    At at;
    State dh, dc, gate[4], c_prev, state;  // dh, dc: that come from outside; state: c, or an RNN's h
  };

  RNNFAST_DEVICE Inputs load(int p, int column, int unit) const {
    Inputs in{};
    in.at = at(p, column);
    if (!in.at.inside) return in;
    const Index H = shape.H, own = in.at.b * H + unit;
    const Index here = in.at.t * shape.B * H + own;
    if (in.at.counts && layer.dy) in.dh = widen(layer.dy[here]);
    if (in.at.final && layer.dh_n) in.dh += widen(layer.dh_n[own]);
    if (shape.cell != Cell::lstm) {
      in.state = widen(layer.y[here]);
      return in;
    }
    if (in.at.counts && layer.dc) in.dc = layer.dc[here];
    if (in.at.final && layer.dc_n) in.dc += layer.dc_n[own];
    const Index before = here + (layer.reverse ? shape.B * H : -shape.B * H);
    in.c_prev = in.at.step == 0 ? layer.c0[own] : layer.c[before];
    in.state = layer.c[here];
    const Real* gates = layer.gates + (in.at.t * shape.B + in.at.b) * 4 * H + unit;
    RNNFAST_UNROLL
    for (int gate = 0; gate < 4; ++gate) in.gate[gate] = widen(gates[gate * H]);
    return in;
  }

  template <class Put>
  RNNFAST_DEVICE void finish(int, int column, int unit, const Inputs& in, const State (&sums)[4], State& dc_after,
                             Put&& put) const {
    using V = Number<State>;
    const Index H = shape.H;
    if (!in.at.inside) {
      if (in.at.step == -1) carry.starts[column * H + unit] = sums[0];
      return;
    }
    const V dh(in.at.starts ? in.dh : in.dh + sums[0]);
    State da[4];
    if (shape.cell == Cell::lstm) {
      const LstmGates<V> gate{V(in.gate[0]), V(in.gate[1]), V(in.gate[2]), V(in.gate[3])};
      V dc(in.at.starts ? in.dc : dc_after + in.dc);
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
    const int G = int(gate_count(shape.cell));
    Real* total = layer.da + (in.at.t * shape.B + in.at.b) * G * H + unit;
    RNNFAST_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      if (gate >= G) break;
      put(gate * H + unit, narrow<Real>(da[gate]));
      // A step's own block comes first, then the later ones whose windows reach back to it.
      if (overlapping())
        total[gate * H] = narrow<Real>(in.at.counts ? da[gate] : widen(total[gate * H]) + da[gate]);
    }
  }

  // Windows at the start may be shorter than k2.
  RNNFAST_DEVICE bool has_cell(int p, int column) const {
    return p <= shape.k2 && at(p, column).step >= -1;
  }
};

}  // namespace rnnfast::cuda
