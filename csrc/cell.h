// The cells: their gate maths, forward and backward, once for every backend.
//
// V is whatever the kernel computes with: a vector of batch lanes on the CPU, a float on a GPU. It must
// bring +, -, *, construction from a scalar constant, and the functions fma, sigmoid, tanh, relu and
// zero_unless_positive, visible before this header is used. Everything is static so that code compiled for
// one instruction set is never merged by the linker with code compiled for another.
//
// LSTM   Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000.
// RNN    Elman 1990.
#pragma once

#if defined(__CUDACC__)
#define RNNFAST_CELL __host__ __device__ static inline
#else
#define RNNFAST_CELL static inline __attribute__((always_inline))
#endif

namespace rnnfast {

template <class V>
struct LstmGates {
  V i, f, g, o;
};

// In: pre-activations a. Out: the gates in their place.
template <class V>
RNNFAST_CELL void lstm_gates(LstmGates<V>& a) {
  a.i = sigmoid(a.i);
  a.f = sigmoid(a.f);
  a.g = tanh(a.g);
  a.o = sigmoid(a.o);
}

// In: pre-activations a. Out: the gates in their place, the new cell state c and hidden state h.
template <class V>
RNNFAST_CELL void lstm_forward(LstmGates<V>& a, V c_prev, V& c, V& h) {
  lstm_gates(a);
  c = fma(a.f, c_prev, a.i * a.g);
  h = a.o * tanh(c);
}

// In: the gates and cell states of the step, dh, and dc as it arrives from the step after.
// Out: da, the gradient of the pre-activations, and dc as it leaves for the step before.
template <class V>
RNNFAST_CELL void lstm_backward(const LstmGates<V>& gate, V c_prev, V c, V dh, V& dc,
                                LstmGates<V>& da) {
  const V one(1);
  const V tanh_c = tanh(c);
  dc = fma(dh * gate.o, one - tanh_c * tanh_c, dc);
  da.i = dc * gate.g * gate.i * (one - gate.i);
  da.f = dc * c_prev * gate.f * (one - gate.f);
  da.g = dc * gate.i * (one - gate.g * gate.g);
  da.o = dh * tanh_c * gate.o * (one - gate.o);
  dc = dc * gate.f;
}

struct TanhCell {
  template <class V>
  RNNFAST_CELL V forward(V a) {
    return tanh(a);
  }
  template <class V>
  RNNFAST_CELL V backward(V h, V dh) {
    return dh * (V(1) - h * h);
  }
};

struct ReluCell {
  template <class V>
  RNNFAST_CELL V forward(V a) {
    return relu(a);
  }
  template <class V>
  RNNFAST_CELL V backward(V h, V dh) {
    return zero_unless_positive(h, dh);
  }
};

}  // namespace rnnfast
