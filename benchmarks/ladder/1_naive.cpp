// Rung 1: the formula, one step, one row, one unit at a time.
//
// Each pre-activation is a sum of I + H products, added one after the other as the formula has them.
// Rounding makes the order of additions part of the result, so the compiler must keep it, and each
// addition waits three or four cycles for the one before. That chain is the bound: in the same cycles
// the vector units could do dozens of operations. Besides, every row of the batch reads all weights
// anew.
//
// Rung 2 turns the loops around, so that neighbouring additions belong to different sums.
#include "layer.h"

void naive(const ladder::Layer& layer) {
  using namespace ladder;
  const Index I = layer.I, H = layer.H;
  std::copy_n(layer.c0, layer.B * H, layer.c);
  Array a(layer.B * 4 * H);
  for (Index t = 0; t < layer.T; ++t) {
    for (Index b = 0; b < layer.B; ++b) {
      const float* x = layer.x + (t * layer.B + b) * I;
      const float* h = layer.h_before(t) + b * H;
      for (Index n = 0; n < 4 * H; ++n) {
        float sum = layer.bias[n];
        for (Index k = 0; k < I; ++k) sum += x[k] * layer.w_ih[n * I + k];
        for (Index k = 0; k < H; ++k) sum += h[k] * layer.w_hh[n * H + k];
        a[b * 4 * H + n] = sum;
      }
    }
    cells(layer, t, a.data(), 4 * H);
  }
}
