// exp, sigmoid, tanh and relu over vectors.
//
// One core serves all: x = n ln2 + r with |r| <= ln2 / 2, and e^r = 1 + r + r^2 q(r) with a minimax
// polynomial q (Remez exchange) that is right to 2^-28 for float and 2^-57 for double.
// tanh goes through e^2x - 1, so it keeps its relative accuracy around zero.
//
// Bound by the FMA units: about 15 operations and one division for 16 floats.
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
  static constexpr float q[] = {0x1.fffffb97a5fddp-2f, 0x1.55549104290d9p-3f, 0x1.5558f2f627353p-5f,
                                0x1.123a1f4696842p-7f, 0x1.6a23cf4eb56d8p-10f};
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  static constexpr float round_magic = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0x1.62e4p-1f;         // few bits, so n * ln2_high is exact
  static constexpr float ln2_low = 0x1.7f7d1cf79abcap-20f;
  static constexpr float largest = 89.0f, smallest = -104.0f;  // beyond: infinity, zero
  static constexpr float tanh_saturates = 10.0f;               // 1 - tanh(x) is below half an ulp
};

template <>
struct ExpConstants<double> {
  static constexpr double q[] = {0x1.000000000000ap-1,  0x1.55555555554f9p-3,  0x1.555555555083ep-5,
                                 0x1.1111111127d0ep-7,  0x1.6c16c18438b11p-10, 0x1.a01a012a0f35cp-13,
                                 0x1.a01999e26209fp-16, 0x1.71df25b30d420p-19, 0x1.28ad9b8648615p-22,
                                 0x1.ad7f3ee5d2f80p-26};
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0x1.62e42fefap-1;
  static constexpr double ln2_low = 0x1.cf79abc9e3b39p-40;
  static constexpr double largest = 710.0, smallest = -746.0;
  static constexpr double tanh_saturates = 20.0;
};

// q(r), by Horner's rule.
template <class Real, int k = 0>
RNNFAST_INLINE Vec<Real> exp_tail(Vec<Real> r) {
  constexpr int count = sizeof(ExpConstants<Real>::q) / sizeof(Real);
  const Vec<Real> coefficient(ExpConstants<Real>::q[k]);
  if constexpr (k + 1 == count)
    return coefficient;
  else
    return fma(exp_tail<Real, k + 1>(r), r, coefficient);
}

// x = n ln2 + r; x must be small enough for n to be exact.
template <class Real>
struct Reduced {
  Vec<Real> magic_n;  // n + round_magic
  Vec<Real> r;
};

template <class Real>
RNNFAST_INLINE Reduced<Real> reduce(Vec<Real> x) {
  using V = Vec<Real>;
  using K = ExpConstants<Real>;
  const V magic_n = fma(x, V(Real(1.4426950408889634)), V(K::round_magic));
  const V n = magic_n - V(K::round_magic);
  const V r = fma(n, V(-K::ln2_high), x);
  return {magic_n, fma(n, V(-K::ln2_low), r)};
}

// 2^n, for n within the normal exponents.
template <class Real>
RNNFAST_INLINE Vec<Real> power_of_two(typename Vec<Real>::Mask n) {
  using K = ExpConstants<Real>;
  return typename Vec<Real>::Native((n + K::exponent_bias) << K::mantissa_bits);
}

// value * 2^n, also where 2^n overflows or the result is denormal.
template <class Real>
RNNFAST_INLINE Vec<Real> scale(Vec<Real> value, Vec<Real> magic_n) {
  using V = Vec<Real>;
  const V magic(ExpConstants<Real>::round_magic);
#if defined(__AVX512F__)
  const V n = magic_n - magic;
  if constexpr (sizeof(Real) == 4)
    return typename V::Native(_mm512_scalef_ps(__m512(value.v), __m512(n.v)));
  else
    return typename V::Native(_mm512_scalef_pd(__m512d(value.v), __m512d(n.v)));
#else
  const auto n = typename V::Mask(magic_n.v) - typename V::Mask(magic.v);
  const auto half = n >> 1;  // in two factors, each a normal number
  return value * power_of_two<Real>(half) * power_of_two<Real>(n - half);
#endif
}

template <class Real>
RNNFAST_INLINE Vec<Real> exp(Vec<Real> x) {
  using V = Vec<Real>;
  using K = ExpConstants<Real>;
  const auto [magic_n, r] = reduce(max(V(K::smallest), min(V(K::largest), x)));
  const V one(1);
  return scale(fma(fma(exp_tail<Real>(r), r, one), r, one), magic_n);
}

template <class Real>
RNNFAST_INLINE Vec<Real> sigmoid(Vec<Real> x) {
  using V = Vec<Real>;
  return V(1) / (V(1) + exp(V(Real(0)) - x));
}

// (e^2|x| - 1) / (e^2|x| + 1), with e^2|x| - 1 = 2^n (e^r - 1) + (2^n - 1).
template <class Real>
RNNFAST_INLINE Vec<Real> tanh(Vec<Real> x) {
  using V = Vec<Real>;
  using K = ExpConstants<Real>;
  const V magnitude = min(V(K::tanh_saturates), abs(x));
  const auto [magic_n, r] = reduce(magnitude + magnitude);
  const V expm1_r = fma(r * r, exp_tail<Real>(r), r);
  using Mask = typename V::Mask;
  const V two_n = power_of_two<Real>(Mask(magic_n.v) - Mask(V(K::round_magic).v));
  const V expm1 = fma(two_n, expm1_r, two_n - V(1));
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
