// The layer in plain loops and double precision: what the kernels must agree with.
//
// Written from csrc/rnnfast.h alone, sharing no code with the kernels. python/rnnfast/reference.py is the
// textbook; this is for programs that have no Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rnnfast.h"

namespace plain {

using rnnfast::Cell;
using rnnfast::Index;
using Values = std::vector<double>;

struct Layer {
  Cell cell;
  Index T, B, I, H;
  bool reverse;
  Values x, w_ih, w_hh, b_ih, b_hh, h0, c0;
  std::vector<Index> lengths = {};  // of packed sequences, the longest first; else none: all have T steps
  Index P = 0;                      // of a projected LSTM; else 0
  Values w_hr = {};

  Index gates() const { return rnnfast::gate_count(cell); }
  Index h_size() const { return P ? P : H; }
  Index length(Index b) const { return lengths.empty() ? T : lengths[b]; }
  Index rows_at(Index t) const {
    Index rows = 0;
    while (rows < B && t < length(rows)) ++rows;
    return rows;
  }
  // Rows of the steps before t.
  Index first_row(Index t) const { return t == 0 ? 0 : first_row(t - 1) + rows_at(t - 1); }
  // Where step p of sequence b, in processing order, stands among the rows of all steps.
  Index row(Index p, Index b) const { return first_row(reverse ? length(b) - 1 - p : p) + b; }
};

struct Outputs {
  Values y, h_n, c_n, c, gates, m;
};

struct Cotangents {
  Values dy, dh_n, dc_n, dc;
};

struct Gradients {
  Values dx, dw_ih, dw_hh, db, dh0, dc0, dw_hr;
};

inline double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

// A row of state in processing order, of `size` numbers: the step before the first is the initial state.
inline const double* row_before(const Layer& layer, Index p, Index b, Index size, const Values& initial,
                                const Values& steps) {
  return p == 0 ? &initial[b * size] : &steps[layer.row(p - 1, b) * size];
}

inline Outputs forward(const Layer& layer) {
  const Index N = layer.first_row(layer.T), B = layer.B, I = layer.I, H = layer.H, G = layer.gates();
  const Index P = layer.h_size();
  const bool lstm = layer.cell == Cell::lstm;
  Outputs out{Values(N * P), layer.h0, layer.c0, Values(lstm ? N * H : 0), Values(lstm ? N * 4 * H : 0),
              Values(layer.P ? N * H : 0)};
  Values a(G * H), m(H);
  for (Index b = 0; b < B; ++b) {
    for (Index p = 0; p < layer.length(b); ++p) {
      const Index row = layer.row(p, b);
      const double* h_prev = row_before(layer, p, b, P, layer.h0, out.y);
      for (Index n = 0; n < G * H; ++n) {
        a[n] = layer.b_ih[n] + layer.b_hh[n];
        for (Index k = 0; k < I; ++k) a[n] += layer.x[row * I + k] * layer.w_ih[n * I + k];
        for (Index k = 0; k < P; ++k) a[n] += h_prev[k] * layer.w_hh[n * P + k];
      }
      for (Index u = 0; u < H; ++u) {
        double h;
        if (lstm) {
          double* gate = &out.gates[row * 4 * H + u];
          const double i = gate[0] = sigmoid(a[u]), f = gate[H] = sigmoid(a[H + u]);
          const double g = gate[2 * H] = std::tanh(a[2 * H + u]), o = gate[3 * H] = sigmoid(a[3 * H + u]);
          const double c = f * row_before(layer, p, b, H, layer.c0, out.c)[u] + i * g;
          h = o * std::tanh(c);
          out.c[row * H + u] = out.c_n[b * H + u] = c;
        } else {
          h = layer.cell == Cell::rnn_tanh ? std::tanh(a[u]) : std::max(a[u], 0.0);
        }
        m[u] = h;
      }
      if (layer.P) std::copy(m.begin(), m.end(), &out.m[row * H]);
      for (Index n = 0; n < P; ++n) {
        double h = layer.P ? 0 : m[n];
        for (Index k = 0; k < H && layer.P; ++k) h += m[k] * layer.w_hr[n * H + k];
        out.y[row * P + n] = out.h_n[b * P + n] = h;
      }
    }
  }
  return out;
}

// TBPTT(k1, k2): for each block of losses, back through its window.
inline Gradients backward(const Layer& layer, const Outputs& out, const Cotangents& up, Index k1,
                          Index k2) {
  const Index B = layer.B, I = layer.I, H = layer.H, GH = layer.gates() * H, P = layer.h_size();
  const bool lstm = layer.cell == Cell::lstm;
  Gradients grad{Values(out.y.size() / P * I), Values(GH * I), Values(GH * P),       Values(GH),
                 Values(B * P),                Values(lstm ? B * H : 0), Values(layer.P * H)};
  Values da(GH);
  for (Index b = 0; b < B; ++b) {
    const Index T = layer.length(b);
    for (Index first = 0; first < T; first += k1) {
      const Index last = std::min(first + k1, T) - 1;  // the block, in time
      const Index begin = layer.reverse ? T - 1 - last : first;  // the same in processing order
      const Index end = layer.reverse ? T - first : last + 1;
      Values dh(P), dm(H), dc(H);
      for (Index p = end - 1; p >= std::max<Index>(begin - (k2 - k1), 0); --p) {
        const Index row = layer.row(p, b);
        const double* h_prev = row_before(layer, p, b, P, layer.h0, out.y);
        for (Index n = 0; n < P && p >= begin; ++n) {
          dh[n] += up.dy[row * P + n];
          if (p == T - 1) dh[n] += up.dh_n[b * P + n];
        }
        for (Index u = 0; u < H; ++u) {
          dm[u] = layer.P ? 0 : dh[u];
          for (Index n = 0; n < P && layer.P; ++n) {
            dm[u] += dh[n] * layer.w_hr[n * H + u];
            grad.dw_hr[n * H + u] += dh[n] * out.m[row * H + u];
          }
          if (!lstm) {
            const double h = out.y[row * H + u];
            da[u] = layer.cell == Cell::rnn_tanh ? dm[u] * (1 - h * h) : h > 0 ? dm[u] : 0;
            continue;
          }
          if (p >= begin) {
            dc[u] += up.dc[row * H + u];
            if (p == T - 1) dc[u] += up.dc_n[b * H + u];
          }
          const double* gate = &out.gates[row * 4 * H + u];
          const double i = gate[0], f = gate[H], g = gate[2 * H], o = gate[3 * H];
          const double tanh_c = std::tanh(out.c[row * H + u]);
          dc[u] += dm[u] * o * (1 - tanh_c * tanh_c);
          da[u] = dc[u] * g * i * (1 - i);
          da[H + u] = dc[u] * row_before(layer, p, b, H, layer.c0, out.c)[u] * f * (1 - f);
          da[2 * H + u] = dc[u] * i * (1 - g * g);
          da[3 * H + u] = dm[u] * tanh_c * o * (1 - o);
          dc[u] *= f;
        }
        std::fill(dh.begin(), dh.end(), 0.0);
        for (Index n = 0; n < GH; ++n) {
          grad.db[n] += da[n];
          for (Index k = 0; k < I; ++k) {
            grad.dw_ih[n * I + k] += da[n] * layer.x[row * I + k];
            grad.dx[row * I + k] += da[n] * layer.w_ih[n * I + k];
          }
          for (Index k = 0; k < P; ++k) {
            grad.dw_hh[n * P + k] += da[n] * h_prev[k];
            dh[k] += da[n] * layer.w_hh[n * P + k];
          }
        }
      }
      if (begin - (k2 - k1) > 0) continue;  // the window does not reach the initial state
      for (Index n = 0; n < P; ++n) grad.dh0[b * P + n] += dh[n];
      for (Index u = 0; u < H && lstm; ++u) grad.dc0[b * H + u] += dc[u];
    }
  }
  return grad;
}

}  // namespace plain
