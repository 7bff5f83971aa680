// The contract between whoever allocates (Python) and whoever computes (cpu/, cuda/).
//
// One plain struct per operation. Nothing here owns memory, knows torch, or names a device: a backend
// reads the inputs, writes the outputs, and may scribble on what is marked scratch. Unless a line says
// otherwise every array is dense and row-major, arrays do not overlap, and a null pointer means
// "absent" only where the line says so.
//
// Sizes   T steps, B batch rows, I input, H hidden units, G gates of the cell (LSTM 4, RNN 1).
// Packed  Sequences may end early: the longest come first, and a step has a row for each that still runs. Where a
//         shape has offsets, (T, B, ...) below stands for (N, ...): these N rows, step after step, without padding.
// Projected LSTM: h is W_hr (o tanh(c)), of P numbers, not H. Where a shape has a projection, P stands in the place of
//         H in the sizes of y, h0, h_n, W_hh's rows and their gradients.
// Gates   stand in torch's order i, f, g, o, so a row of 4H holds i(0..H), f(0..H), g(0..H), o(0..H).
// Steps   t is the index into the arrays; p counts steps in processing order: p = t, or p = T-1-t for
//         a layer that runs in reverse. "Previous" always means previous in processing order.
#pragma once

#include <cstdint>

namespace rnnfast {

using Index = std::int64_t;

enum class Cell { lstm, rnn_tanh, rnn_relu };

// A number of the bfloat16 format, the upper half of a float: for storage; arithmetic is done in float.
struct BFloat16 {
  std::uint16_t bits;
};

// What kernels add up in, and keep cell states in, where arrays hold `Storage`: float for bfloat16.
template <class Storage>
struct Accumulator {
  using Type = Storage;
};
template <>
struct Accumulator<BFloat16> {
  using Type = float;
};
template <class Storage>
using RealOf = typename Accumulator<Storage>::Type;

constexpr Index gate_count(Cell cell) { return cell == Cell::lstm ? 4 : 1; }

struct LayerShape {
  Cell cell;
  Index T, B, I, H;
  bool reverse;  // run t = T-1 .. 0
  int threads;   // at most this many threads, >= 1
  const Index* offsets = nullptr;  // packed: (T + 1), the first row of every step, and N; else null
  Index projection = 0;            // P of a projected LSTM; 0: h is not projected

  Index h_size() const { return projection > 0 ? projection : H; }

  // Rows of step t, none before the first and after the last: batch rows [0, rows_at(t)) run.
  Index rows_at(Index t) const {
    if (t < 0 || t >= T) return 0;
    return offsets ? offsets[t + 1] - offsets[t] : B;
  }
  // Where they begin among the rows of all steps, 0 <= t <= T.
  Index first_row(Index t) const { return offsets ? offsets[t] : t * B; }
  Index rows() const { return first_row(T); }
  // Rows of a step on average, rounded up.
  Index mean_rows() const { return offsets && T > 0 ? (rows() + T - 1) / T : B; }

  // In processing order: step p, and the step before step t, both as indices into the arrays.
  Index time(Index p) const { return reverse ? T - 1 - p : p; }
  Index before(Index t) const { return reverse ? t + 1 : t - 1; }
  Index after(Index t) const { return reverse ? t - 1 : t + 1; }
};

// One layer, one direction, forward.
template <class Storage>
struct LayerForward {
  using Real = RealOf<Storage>;
  LayerShape shape;

  const Storage* x;     // input   (T, B, I)
  const Storage* w_ih;  // input   (G*H, I)
  const Storage* w_hh;  // input   (G*H, H)
  const Storage* b_ih;  // input   (G*H)      may be null: zero
  const Storage* b_hh;  // input   (G*H)      may be null: zero
  const Storage* h0;    // input   (B, H)     what a sequence's first step in processing order is given
  const Real* c0;       // input   (B, H)     LSTM only, else null

  Storage* y;    // output  (T, B, H)       hidden state of every step; an RNN's saved tensor too
  Storage* h_n;  // output  (B, H)          hidden state after a sequence's last step; may be null: not wanted
  Real* c_n;     // output  (B, H)          LSTM only, else null
  Real* c;       // saved   (T, B, H)       LSTM: cell state of every step; null: not kept
  Real* gates;   // saved   (T, B, 4, H)    LSTM: i, f, g, o after their nonlinearities; null: not kept

  // Projected only, else null.
  const Storage* w_hr = nullptr;  // input  (P, H)
  Storage* m = nullptr;           // saved  (T, B, H)  o tanh(c), which is projected; null: not kept

  // The name of weights that hold what they held in every call with it (cpu/frozen.h); 0: they may have changed.
  std::uint64_t frozen = 0;

  bool halve_w_hh = false;  // float only: use w_hh rounded to bfloat16, and keep it so: half the bytes a step
};

// One layer, one direction, backward, truncated or not.
//
// Truncation TBPTT(k1, k2): losses are grouped in blocks of k1 steps, block j covering
// t in [j*k1, min((j+1)*k1, T)). A block's losses send gradient through the block itself and the
// k2-k1 steps that precede it in processing order, and no further. A window that reaches p = 0 also
// passes gradient on to h0 and c0. Gradients of the final states belong to the last block in processing
// order. k1 = k2 = T is plain BPTT. Packed, each sequence is cut where it would be by itself.
template <class Storage>
struct LayerBackward {
  using Real = RealOf<Storage>;
  LayerShape shape;
  Index k1, k2;  // 1 <= k1 <= T and k1 <= k2 <= N*k1, where N = ceil(T / k1) is the number of blocks

  const Storage* dy;    // input   (T, B, H)   may be null: zero
  const Storage* dh_n;  // input   (B, H)      may be null: zero
  const Real* dc_n;     // input   (B, H)      LSTM; may be null: zero
  const Real* dc;       // input   (T, B, H)   LSTM: gradient of every step's cell state; may be null: zero

  const Storage* x;     // input  (T, B, I)
  const Storage* w_ih;  // input  (G*H, I)
  const Storage* w_hh;  // input  (G*H, H)
  const Storage* h0;    // input  (B, H)
  const Real* c0;       // input  (B, H)       LSTM only, else null
  const Storage* y;     // saved  (T, B, H)    as the forward pass left it
  const Real* c;        // saved  (T, B, H)    LSTM only, else null
  const Real* gates;    // saved  (T, B, 4, H) LSTM only, else null; null: computed again, see below

  Storage* dx;     // output  (T, B, I)     may be null: not wanted
  Storage* dw_ih;  // output  (G*H, I)      may be null: not wanted
  Storage* dw_hh;  // output  (G*H, H)      may be null: not wanted
  Storage* db;     // output  (G*H)         gradient of b_ih, and of b_hh; may be null: not wanted;
                   //                        needs dw_hh to be wanted too
  Storage* dh0;    // output  (B, H)        may be null: not wanted
  Real* dc0;       // output  (B, H)        LSTM; may be null: not wanted

  Storage* da;          // scratch (T, B, G*H)     gradient of the pre-activations; only when k1 < T, else null
  Storage* da_windows;  // scratch (2, N*B, G*H)   the same, of each window; only when k2 > k1, else null
  Real* da_sums;        // scratch (T, B, G*H)     the same, added up over windows; only when k2 > k1 and
                        //                         Storage is not Real, else null

  // Only where an LSTM's gates are computed again, from x and y.
  const Storage* b_ih;  // input   (4*H)       may be null: zero
  const Storage* b_hh;  // input   (4*H)       may be null: zero

  // Projected only, else null. Windows must not overlap then: k1 = k2.
  const Storage* w_hr = nullptr;  // input   (P, H)
  const Storage* m = nullptr;     // saved   (T, B, H)
  Storage* dw_hr = nullptr;       // output  (P, H)    may be null: not wanted
};

// The recurrence alone, for a backend that leaves the products over all steps to somebody else's GEMM.
//
// State is what sums and cell states are kept in: Real, or float where Real has 16 bits.
struct RecurrenceShape {
  Cell cell;
  Index T, B, H;
  Index k1, k2;  // backward: as in LayerBackward
};

template <class Real, class State>
struct RecurrenceForward {
  bool reverse;

  const Real* a;     // input   (T, B, G*H)   x W_ih^T + b_ih + b_hh; gates may be its memory
  const Real* w_hh;  // input   (G*H, H)
  const Real* h0;    // input   (B, H)
  const State* c0;   // input   (B, H)        LSTM only, else null

  Real* y;      // output  (T, B, H)
  Real* h_n;    // output  (B, H)
  State* c_n;   // output  (B, H)        LSTM only, else null
  State* c;     // saved   (T, B, H)     LSTM: cell state of every step; null: not kept
  Real* gates;  // saved   (T, B, 4, H)  LSTM: i, f, g, o after their nonlinearities; null: not kept
};

// The weights' gradients and dx are products of da: dW_ih = da^T x, dW_hh = da^T h[t-1], dx = da W_ih.
template <class Real, class State>
struct RecurrenceBackward {
  bool reverse;

  const Real* dy;     // input   (T, B, H)   may be null: zero
  const Real* dh_n;   // input   (B, H)      may be null: zero
  const State* dc_n;  // input   (B, H)      LSTM; may be null: zero
  const State* dc;    // input   (T, B, H)   LSTM: gradient of every step's cell state; may be null: zero

  const Real* w_hh;   // input   (G*H, H)
  const State* c0;    // input   (B, H)       LSTM only, else null
  const Real* y;      // saved   (T, B, H)    RNN only, else null
  const State* c;     // saved   (T, B, H)    LSTM only, else null
  const Real* gates;  // saved   (T, B, 4, H) LSTM only, else null

  Real* da;    // output  (T, B, G*H)  gradient of the pre-activations
  Real* dh0;   // output  (B, H)
  State* dc0;  // output  (B, H)       LSTM only, else null
};

}  // namespace rnnfast
