// A number as cell.h wants one: what a vector of lanes is to the CPU kernels, a scalar is here. Products
// that cell.h does not ask to fuse are not fused (the build turns contraction off), as on the CPU.
#pragma once

#include <cmath>

#include "platform.h"

#include "../cell.h"

namespace rnnfast::cuda {

RNNFAST_DEVICE double tanh_of(double x) { return std::tanh(x); }

// To a few units in the last place: for small x, where 1 - e^-2x would cancel, the series of tanh.
RNNFAST_DEVICE float tanh_of(float x) {
  const float square = x * x, size = std::fabs(x);
  const float e = exp_of(-2 * size);
  const float large = (1 - e) * inverse(1 + e);
  float series = std::fma(square, 62.0f / 2835, -17.0f / 315);
  series = std::fma(square, series, 2.0f / 15);
  series = std::fma(square, series, -1.0f / 3);
  return size < 0.25f ? std::fma(x * square, series, x) : std::copysign(large, x);
}

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
  RNNFAST_DEVICE friend Number sigmoid(Number x) {
    return Number(inverse(T(1) + exp_of(-x.value)));
  }
  RNNFAST_DEVICE friend Number tanh(Number x) { return Number(tanh_of(x.value)); }
  // Comparisons that let a NaN pass, as torch's do.
  RNNFAST_ANYWHERE friend Number relu(Number x) { return x.value < T(0) ? Number(T(0)) : x; }
  RNNFAST_ANYWHERE friend Number zero_unless_positive(Number h, Number x) {
    return h.value <= T(0) ? Number(T(0)) : x;
  }
};

}  // namespace rnnfast::cuda
