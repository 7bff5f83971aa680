// bfloat16 in the kernels: read and written by vectors of floats, multiplied in pairs.
//
// The processors' instruction (vdpbf16ps) multiplies two neighbouring terms of a sum at a time and adds
// both products to a float. Two bfloat16 are as large as one float, so a row of K numbers is a row of
// ceil(K / 2) pairs, and packing and tiles treat pairs as they treat floats. `Element` stands for what a
// product takes at a time: a float, a double, or a Pair. Where the instruction is missing a Pair costs
// two fmas, exact but for the rounding of the sum; the instruction itself counts denormals as zero.
#pragma once

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// Neighbouring terms; as strictly aligned as one number, because rows may begin anywhere.
struct Pair {
  BFloat16 first, second;
};

template <>
struct Register<Pair> {
  using Bits = std::int32_t;
  typedef std::int32_t Native __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef std::int32_t Mask __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};

// What an array's numbers are multiplied as, what an element is made of, and what its products add up in.
template <class Storage>
struct ElementTrait {
  using Type = Storage;
};
template <>
struct ElementTrait<BFloat16> {
  using Type = Pair;
};
template <class Storage>
using ElementOf = typename ElementTrait<Storage>::Type;

template <class Element>
struct StorageTrait {
  using Type = Element;
};
template <>
struct StorageTrait<Pair> {
  using Type = BFloat16;
};
template <class Element>
using StorageOf = typename StorageTrait<Element>::Type;
template <class Element>
using SumOf = RealOf<StorageOf<Element>>;

// Terms in an element, and elements in a row of `count` numbers.
template <class Element>
constexpr Index terms_in = sizeof(Element) / sizeof(StorageOf<Element>);
template <class Element>
constexpr Index elements_in(Index count) {
  return (count + terms_in<Element> - 1) / terms_in<Element>;
}

// Weights may be kept as pairs and multiplied by floats, each term of a pair in turn: half the bytes of the
// same product. So many elements of the left side meet one of the weights.
template <class Element, class Weight>
constexpr Index parts_of = terms_in<Weight> / terms_in<Element>;

// A row of numbers as a row of elements, and back. Of an odd row the last pair's second half is not there.
template <class Storage>
RNNFAST_INLINE const ElementOf<Storage>* as_elements(const Storage* row) {
  return reinterpret_cast<const ElementOf<Storage>*>(row);
}
template <class Element>
RNNFAST_INLINE const StorageOf<Element>* as_numbers(const Element* row) {
  return reinterpret_cast<const StorageOf<Element>*>(row);
}

// Conversions. To bfloat16: nearest, ties to even; a NaN stays one.

typedef std::uint16_t Halves __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
typedef std::uint32_t FloatBits __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

RNNFAST_INLINE Vec<float> widened(Halves halves) {
  return Register<float>::Native(__builtin_convertvector(halves, FloatBits) << 16);
}
// The upper half of the result is the bfloat16; the lower half is of no meaning.
RNNFAST_INLINE FloatBits rounded_bits(Vec<float> value) {
  const FloatBits bits = FloatBits(value.v), is_nan = FloatBits(value.v != value.v);
  const FloatBits nearest = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
  return (quiet & is_nan) | (nearest & ~is_nan);
}
RNNFAST_INLINE Halves rounded(Vec<float> value) {
  return __builtin_convertvector(rounded_bits(value) >> 16, Halves);
}

// The first n < width numbers of a row, with zeros behind; and the way back.
RNNFAST_INLINE Halves load_halves(const BFloat16* from, Index n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return Halves(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), from));
#else
  Halves halves{};
  for (Index lane = 0; lane < n; ++lane) halves[lane] = from[lane].bits;
  return halves;
#endif
}
RNNFAST_INLINE void store_halves(Halves halves, BFloat16* to, Index n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(to, __mmask16((1u << n) - 1), __m256i(halves));
#else
  for (Index lane = 0; lane < n; ++lane) to[lane].bits = halves[lane];
#endif
}

// Numbers of any storage as a vector to compute with: the first n of them, with zeros behind.
template <class Real>
RNNFAST_INLINE Vec<Real> load(const Real* from, Index n) {
  return Vec<Real>::load(from, n);
}
RNNFAST_INLINE Vec<float> load(const BFloat16* from, Index n) {
  if (n < Vec<float>::width) return widened(load_halves(from, n));
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(Halves));
  return widened(halves);
}
template <class Real>
RNNFAST_INLINE void store(Vec<Real> value, Real* to, Index n) {
  value.store(to, n);
}
RNNFAST_INLINE void store(Vec<float> value, BFloat16* to, Index n) {
  const Halves halves = rounded(value);
  if (n < Vec<float>::width) return store_halves(halves, to, n);
  __builtin_memcpy(to, &halves, sizeof(Halves));
}

// The same for one number.
template <class Real>
RNNFAST_INLINE Real load(const Real* from) {
  return *from;
}
RNNFAST_INLINE float load(const BFloat16* from) { return load(from, 1).v[0]; }
template <class Real>
RNNFAST_INLINE void store(Real value, Real* to) {
  *to = value;
}
RNNFAST_INLINE void store(float value, BFloat16* to) { store(Vec<float>(value), to, 1); }

// Elements of one row: the first n of its numbers, with zeros behind.
template <class Real>
RNNFAST_INLINE Vec<Real> load_along(const Real* from, Index n) {
  return Vec<Real>::load(from, n);
}
RNNFAST_INLINE Vec<Pair> load_along(const BFloat16* from, Index n) {
  if (n >= 2 * Vec<Pair>::width) return Vec<Pair>::load(as_elements(from));
#if defined(__AVX512BW__)
  return Register<Pair>::Native(_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), from));
#else
  Vec<Pair> pairs(Register<Pair>::Native{});
  __builtin_memcpy(&pairs.v, from, std::size_t(n) * sizeof(BFloat16));
  return pairs;
#endif
}

// One element for each of n columns, with zeros behind: a number of one row, or a number of each of two rows.
// No second row (null): zeros.
template <class Real>
RNNFAST_INLINE Vec<Real> load_across(const Real* row, const Real*, Index n) {
  return Vec<Real>::load(row, n);
}
RNNFAST_INLINE Vec<Pair> load_across(const BFloat16* row, const BFloat16* second, Index n) {
  const FloatBits low = FloatBits(load(row, n).v) >> 16;
  return Register<Pair>::Native(second ? low | FloatBits(load(second, n).v) : low);
}

// Elements made of the first n numbers of a row, rounded if need be, with zeros behind.
template <class Element>
RNNFAST_INLINE Vec<Element> load_rounded(const StorageOf<Element>* from, Index n) {
  return load_along(from, n);
}
template <class Element, class = std::enable_if_t<std::is_same_v<Element, Pair>>>
RNNFAST_INLINE Vec<Pair> load_rounded(const float* from, Index n) {
  constexpr Index width = Vec<float>::width;
  BFloat16 halves[2 * width] = {};
  store(load(from, n), halves, width);
  if (n > width) store(load(from + width, n - width), halves + width, width);
  return load_along(halves, 2 * width);
}

// The first n numbers of a row as they are, or as they are kept where weights are pairs.
template <class Weight, class Real>
RNNFAST_INLINE Vec<Real> load_as_kept(const Real* from, Index n) {
  if constexpr (parts_of<Real, Weight> == 2)
    return Register<float>::Native(rounded_bits(Vec<Real>::load(from, n)) & 0xffff0000u);
  else
    return Vec<Real>::load(from, n);
}
template <class Weight>
RNNFAST_INLINE Vec<Pair> load_as_kept(const BFloat16* from, Index n) {
  return load_along(from, n);
}

// The first n lanes of a vector of elements, with zeros behind; and the way back.
template <class Real>
RNNFAST_INLINE Vec<Real> load_elements(const Real* from, Index n) {
  return Vec<Real>::load(from, n);
}
RNNFAST_INLINE Vec<Pair> load_elements(const Pair* from, Index n) { return load_along(as_numbers(from), 2 * n); }
template <class Real>
RNNFAST_INLINE void store_elements(Vec<Real> value, Real* to, Index n) {
  value.store(to, n);
}
RNNFAST_INLINE void store_elements(Vec<Pair> value, Pair* to, Index n) {
#if defined(__AVX512F__)
  value.store(to, n);
#else
  __builtin_memcpy(to, &value.v, sizeof(Pair) * std::size_t(n < Vec<Pair>::width ? n : Vec<Pair>::width));
#endif
}

template <class Real>
RNNFAST_INLINE Vec<Real> broadcast(const Real* from) {
  return Vec<Real>(*from);
}
RNNFAST_INLINE Vec<Pair> broadcast(const Pair* from) {
  std::int32_t bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return bits - Register<Pair>::Native{};
}

// The factors that elements of the left side meet in a vector of weights: all of it, or one term of each pair.
template <class Element, class Weight>
RNNFAST_INLINE Vec<Element> factors(Vec<Weight> weights, Index part) {
  if constexpr (std::is_same_v<Element, Weight>)
    return weights;
  else
    return Register<float>::Native(part == 0 ? FloatBits(weights.v) << 16 : FloatBits(weights.v) & 0xffff0000u);
}

// sum + a * b, for every element; of a pair both products.
template <class Real>
RNNFAST_INLINE Vec<Real> multiply_add(Vec<Real> a, Vec<Real> b, Vec<Real> sum) {
  return fma(a, b, sum);
}
RNNFAST_INLINE Vec<float> multiply_add(Vec<Pair> a, Vec<Pair> b, Vec<float> sum) {
  using Native = Register<float>::Native;
#if defined(__AVX512BF16__)
  return Native(_mm512_dpbf16_ps(__m512(sum.v), __m512bh(a.v), __m512bh(b.v)));
#else
  const auto first = [](Vec<Pair> pairs) RNNFAST_LAMBDA { return Vec<float>(Native(FloatBits(pairs.v) << 16)); };
  const auto second = [](Vec<Pair> pairs)
                          RNNFAST_LAMBDA { return Vec<float>(Native(FloatBits(pairs.v) & 0xffff0000u)); };
  return fma(second(a), second(b), fma(first(a), first(b), sum));
#endif
}

// sum + a, of a pair both halves.
template <class Real>
RNNFAST_INLINE Vec<Real> add_terms(Vec<Real> a, Vec<Real> sum) {
  return sum + a;
}
RNNFAST_INLINE Vec<float> add_terms(Vec<Pair> a, Vec<float> sum) {
  constexpr Pair ones{{0x3f80}, {0x3f80}};
  return multiply_add(a, broadcast(&ones), sum);
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
