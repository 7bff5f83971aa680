// What every rung computes: an LSTM layer forward, in one direction, on one thread, in float.
//
//   a = x[t] W_ih^T + h[t-1] W_hh^T + bias          cut in four along its last axis: i, f, g, o
//   c[t] = sigmoid(f) c[t-1] + sigmoid(i) tanh(g)        h[t] = sigmoid(o) tanh(c[t])
//
// 2 T B 4H (I + H) floating-point operations, in whatever order. The rungs differ in nothing but that order,
// and in where numbers are meanwhile.
#pragma once

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "rnnfast.h"

namespace rnnfast {

// The cell of csrc/cell.h for single floats, by the functions of the C library.
inline float sigmoid(float a) { return 1 / (1 + std::exp(-a)); }
using std::fma;
using std::tanh;

}  // namespace rnnfast

#include "cell.h"

namespace ladder {

using rnnfast::Index;

// Arrays are dense and row-major, as in csrc/rnnfast.h.
struct Layer {
  Index T, B, I, H;   // steps, batch rows, input size, hidden units
  const float* x;     // input   (T, B, I)
  const float* w_ih;  // input   (4H, I)
  const float* w_hh;  // input   (4H, H)
  const float* bias;  // input   (4H)       b_ih + b_hh
  const float* h0;    // input   (B, H)
  const float* c0;    // input   (B, H)
  float* y;           // output  (T, B, H)  h of every step
  float* c;           // output  (B, H)     the cell state, in the end that of the last step

  const float* h_before(Index t) const { return t == 0 ? h0 : y + (t - 1) * B * H; }
};

// Memory of a rung's own begins at a cache line: a vector that straddles two of them is two loads.
template <class Number>
struct FromCacheLine {
  using value_type = Number;
  static constexpr std::align_val_t line{64};
  Number* allocate(std::size_t n) { return static_cast<Number*>(::operator new(n * sizeof(Number), line)); }
  void deallocate(Number* memory, std::size_t) { ::operator delete(memory, line); }
  bool operator==(FromCacheLine) const { return true; }
  bool operator!=(FromCacheLine) const { return false; }
};
using Array = std::vector<float, FromCacheLine<float>>;

// One cell for each row b and unit u, from pre-activations whose rows are `stride` floats apart.
inline void cells(const Layer& layer, Index t, const float* preactivations, Index stride) {
  const Index H = layer.H;
  for (Index b = 0; b < layer.B; ++b) {
    const float* a = preactivations + b * stride;
    for (Index u = 0; u < H; ++u) {
      rnnfast::LstmGates<float> gate{a[u], a[H + u], a[2 * H + u], a[3 * H + u]};
      float& c = layer.c[b * H + u];
      rnnfast::lstm_forward(gate, float(c), c, layer.y[(t * layer.B + b) * H + u]);
    }
  }
}

}  // namespace ladder

extern "C" {
void naive(const ladder::Layer& layer);
void blocked(const ladder::Layer& layer);
void packed(const ladder::Layer& layer);
void fused(const ladder::Layer& layer);
}
