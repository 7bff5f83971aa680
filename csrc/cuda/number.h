// A number as cell.h wants one: what a vector of lanes is to the CPU kernels, a scalar is here. Products
// that cell.h does not ask to fuse are not fused (the build turns contraction off), as on the CPU.
#pragma once

#include <cmath>

#include "platform.h"

#include "../cell.h"

namespace rnnfast::cuda {

template <class T>
struct Number {
  T value;

  RNNFAST_ANYWHERE explicit Number(T v) : value(v) {}
  template <class Constant>
  RNNFAST_ANYWHERE explicit Number(Constant v) : value(T(v)) {}

  RNNFAST_ANYWHERE friend Number operator+(Number a, Number b) { return Number(a.value + b.value); }
  RNNFAST_ANYWHERE friend Number operator-(Number a, Number b) { return Number(a.value - b.value); }
  RNNFAST_ANYWHERE friend Number operator*(Number a, Number b) { return Number(a.value * b.value); }
  RNNFAST_ANYWHERE friend Number fma(Number a, Number b, Number c) {
    return Number(std::fma(a.value, b.value, c.value));
  }
  RNNFAST_ANYWHERE friend Number sigmoid(Number x) {
    return Number(T(1) / (T(1) + std::exp(-x.value)));
  }
  RNNFAST_ANYWHERE friend Number tanh(Number x) { return Number(std::tanh(x.value)); }
  // Comparisons that let a NaN pass, as torch's do.
  RNNFAST_ANYWHERE friend Number relu(Number x) { return x.value < T(0) ? Number(T(0)) : x; }
  RNNFAST_ANYWHERE friend Number zero_unless_positive(Number h, Number x) {
    return h.value <= T(0) ? Number(T(0)) : x;
  }
};

}  // namespace rnnfast::cuda
