// exp, sigmoid, tanh and relu over vectors.
//
// One core serves all: x = n ln2 + r with |r| <= ln2 / 2, and a Taylor polynomial for e^r - 1, long
// enough (degree 7 for float, 13 for double) that its truncation is below a tenth of an ulp.
// tanh goes through e^2x - 1, so it keeps its relative accuracy around zero.
//
// Largest errors, in ulp of the exact result, that tests/test_vmath.py holds every instruction set to
// over all exponents: exp 2, sigmoid 3, tanh 4. NaN gives NaN, infinities give their limits, denormal
// arguments count as they are. A sigmoid whose exact value is denormal may come out as zero.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int degree = 7;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  static constexpr float round_magic = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0x1.62e4p-1f;         // few bits, so n * ln2_high is exact
  static constexpr float ln2_low = 0x1.7f7d1cf79abcap-20f;
  static constexpr float largest = 89.0f, smallest = -104.0f;  // beyond: infinity, zero
  static constexpr float tanh_saturates = 10.0f;               // 1 - tanh(x) is below half an ulp
};

template <>
struct ExpConstants<double> {
  static constexpr int degree = 13;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0x1.62e42fefap-1;
  static constexpr double ln2_low = 0x1.cf79abc9e3b39p-40;
  static constexpr double largest = 710.0, smallest = -746.0;
  static constexpr double tanh_saturates = 20.0;
};

constexpr double inverse_factorial(int k) { return k == 0 ? 1.0 : inverse_factorial(k - 1) / k; }

// e^r - 1 for |r| <= ln2 / 2, as r + r^2 (1/2 + r/6 + ...): the leading r stays exact.
template <class Real, int k = 2>
RNNFAST_INLINE Vec<Real> expm1_tail(Vec<Real> r) {
  const Vec<Real> coefficient{Real(inverse_factorial(k))};
  if constexpr (k == ExpConstants<Real>::degree)
    return coefficient;
  else
    return fma(expm1_tail<Real, k + 1>(r), r, coefficient);
}

// Splits x into an integer n and expm1(r); x must be finite and small enough for n to be exact.
template <class Real>
struct Reduced {
  typename Vec<Real>::Mask n;
  Vec<Real> expm1_r;
};

template <class Real>
RNNFAST_INLINE Reduced<Real> reduce(Vec<Real> x) {
  using V = Vec<Real>;
  using K = ExpConstants<Real>;
  const V shifted = fma(x, V(Real(1.4426950408889634)), V(K::round_magic));
  const V n = shifted - V(K::round_magic);
  V r = fma(n, V(-K::ln2_high), x);
  r = fma(n, V(-K::ln2_low), r);
  using Mask = typename V::Mask;
  return {Mask(shifted.v) - Mask(V(K::round_magic).v), fma(r * r, expm1_tail<Real>(r), r)};
}

// 2^n for n within the normal exponents.
template <class Real>
RNNFAST_INLINE Vec<Real> power_of_two(typename Vec<Real>::Mask n) {
  using K = ExpConstants<Real>;
  return typename Vec<Real>::Native((n + K::exponent_bias) << K::mantissa_bits);
}

template <class Real>
RNNFAST_INLINE Vec<Real> clamp(Vec<Real> x, Real low, Real high) {
  using V = Vec<Real>;
  x = V::select(x.v < V(low).v, V(low), x);  // NaN fails both tests and passes through
  return V::select(x.v > V(high).v, V(high), x);
}

template <class Real>
RNNFAST_INLINE Vec<Real> exp(Vec<Real> x) {
  using V = Vec<Real>;
  using K = ExpConstants<Real>;
  const auto [n, expm1_r] = reduce(clamp(x, K::smallest, K::largest));
  // Two factors: 2^n itself overflows near the top and underflows where results are denormal.
  const auto half = n >> 1;
  return (V(1) + expm1_r) * power_of_two<Real>(half) * power_of_two<Real>(n - half);
}

template <class Real>
RNNFAST_INLINE Vec<Real> sigmoid(Vec<Real> x) {
  using V = Vec<Real>;
  return V(1) / (V(1) + exp(V(Real(0)) - x));
}

// (e^2|x| - 1) / (e^2|x| + 1), with e^2|x| - 1 = 2^n expm1(r) + (2^n - 1).
template <class Real>
RNNFAST_INLINE Vec<Real> tanh(Vec<Real> x) {
  using V = Vec<Real>;
  const V magnitude = clamp(abs(x), Real(0), ExpConstants<Real>::tanh_saturates);
  const auto [n, expm1_r] = reduce(magnitude + magnitude);
  const V scale = power_of_two<Real>(n);
  const V expm1 = fma(scale, expm1_r, scale - V(1));
  return copysign(expm1 / (expm1 + V(2)), x);
}

template <class Real>
RNNFAST_INLINE Vec<Real> relu(Vec<Real> x) {
  using V = Vec<Real>;
  return V::select(x.v < V(Real(0)).v, V(Real(0)), x);
}

// The derivative of relu, as torch takes it: 0 where h <= 0, else the value, so a NaN in h lets it pass.
template <class Real>
RNNFAST_INLINE Vec<Real> zero_unless_positive(Vec<Real> h, Vec<Real> value) {
  using V = Vec<Real>;
  return V::select(h.v <= V(Real(0)).v, V(Real(0)), value);
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
