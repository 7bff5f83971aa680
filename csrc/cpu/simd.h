// A vector of floats or doubles, as wide as the instruction set this file is compiled for.
//
// A thin layer over the compiler's vector types (GCC and Clang), so that each kernel is written once and
// compiled once per instruction set. Everything lives in a namespace named after that set: nothing here
// can be shared, or merged by the linker, between a build for AVX-512 and a build for plain x86-64.
// fma is written out rather than left to the compiler's contraction, because results must not depend
// on how a loop was unrolled; targets without the instruction round twice.
#pragma once

#include <cstdint>

#include "../rnnfast.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define RNNFAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RNNFAST_VECTOR_BYTES 32
#else
#define RNNFAST_VECTOR_BYTES 16
#endif

#define RNNFAST_INLINE inline __attribute__((always_inline))
// The same for a lambda. GCC drops calls that do nothing but prefetch, unless they are inlined first.
#define RNNFAST_LAMBDA __attribute__((always_inline))

namespace rnnfast::cpu::RNNFAST_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

#if defined(__AVX512F__) || defined(__FMA__) || defined(__aarch64__)
constexpr bool has_fma = true;
#else
constexpr bool has_fma = false;  // products take registers too
#endif

// How many batch rows a register tile of 4 vectors a row may have: what leaves registers for the factors.
constexpr int tile_rows = vector_registers == 32 ? 6 : 3;
constexpr int tile_vectors = 4;

// The compiler's own types. Spelled out per type: GCC drops the attribute from a dependent typedef.
template <class Real>
struct Register;
template <>
struct Register<float> {
  using Bits = std::int32_t;
  typedef float Native __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef std::int32_t Mask __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};
template <>
struct Register<double> {
  using Bits = std::int64_t;
  typedef double Native __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef std::int64_t Mask __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
};

template <class Real>
struct Vec {
  using Bits = typename Register<Real>::Bits;
  using Native = typename Register<Real>::Native;
  using Mask = typename Register<Real>::Mask;
  static constexpr int width = RNNFAST_VECTOR_BYTES / sizeof(Real);

  Native v;

  Vec() = default;
  RNNFAST_INLINE Vec(Native native) : v(native) {}
  RNNFAST_INLINE explicit Vec(Real scalar) : v(scalar - Native{}) {}

  // All lanes, or the first n of them with zeros behind.
  static RNNFAST_INLINE Vec load(const Real* from) {
    Vec result;
    __builtin_memcpy(&result.v, from, sizeof(Native));
    return result;
  }
  static RNNFAST_INLINE Vec load(const Real* from, Index n) {
    if (n >= width) return load(from);
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == 4)
      return Native(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), from));
    else
      return Native(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), from));
#else
    Vec result(Native{});
    for (Index lane = 0; lane < n; ++lane) result.v[lane] = from[lane];
    return result;
#endif
  }
  RNNFAST_INLINE void store(Real* to) const { __builtin_memcpy(to, &v, sizeof(Native)); }
  RNNFAST_INLINE void store(Real* to, Index n) const {
    if (n >= width) return store(to);
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == 4)
      _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), __m512(v));
    else
      _mm512_mask_storeu_pd(to, __mmask8((1u << n) - 1), __m512d(v));
#else
    for (Index lane = 0; lane < n; ++lane) to[lane] = v[lane];
#endif
  }

  friend RNNFAST_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend RNNFAST_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend RNNFAST_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend RNNFAST_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }

  friend RNNFAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == 4)
      return Native(_mm512_fmadd_ps(__m512(a.v), __m512(b.v), __m512(c.v)));
    else
      return Native(_mm512_fmadd_pd(__m512d(a.v), __m512d(b.v), __m512d(c.v)));
#elif defined(__FMA__)
    if constexpr (sizeof(Real) == 4)
      return Native(_mm256_fmadd_ps(__m256(a.v), __m256(b.v), __m256(c.v)));
    else
      return Native(_mm256_fmadd_pd(__m256d(a.v), __m256d(b.v), __m256d(c.v)));
#elif defined(__aarch64__)
    if constexpr (sizeof(Real) == 4)
      return Native(vfmaq_f32(float32x4_t(c.v), float32x4_t(a.v), float32x4_t(b.v)));
    else
      return Native(vfmaq_f64(float64x2_t(c.v), float64x2_t(a.v), float64x2_t(b.v)));
#else
    return a.v * b.v + c.v;
#endif
  }

  // Lane by lane: where the condition holds a, else b. A NaN makes every comparison false.
  static RNNFAST_INLINE Vec select(Mask condition, Vec a, Vec b) {
    return Native((Mask(a.v) & condition) | (Mask(b.v) & ~condition));
  }
  // The lesser and the greater, lane by lane; b where either is NaN.
  friend RNNFAST_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == 4)
      return Native(_mm512_min_ps(__m512(a.v), __m512(b.v)));
    else
      return Native(_mm512_min_pd(__m512d(a.v), __m512d(b.v)));
#elif defined(__AVX2__)
    if constexpr (sizeof(Real) == 4)
      return Native(_mm256_min_ps(__m256(a.v), __m256(b.v)));
    else
      return Native(_mm256_min_pd(__m256d(a.v), __m256d(b.v)));
#else
    return select(a.v < b.v, a, b);
#endif
  }
  friend RNNFAST_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Real) == 4)
      return Native(_mm512_max_ps(__m512(a.v), __m512(b.v)));
    else
      return Native(_mm512_max_pd(__m512d(a.v), __m512d(b.v)));
#elif defined(__AVX2__)
    if constexpr (sizeof(Real) == 4)
      return Native(_mm256_max_ps(__m256(a.v), __m256(b.v)));
    else
      return Native(_mm256_max_pd(__m256d(a.v), __m256d(b.v)));
#else
    return select(a.v > b.v, a, b);
#endif
  }
  static RNNFAST_INLINE Mask sign_bit() { return Mask{} + (Bits(1) << (8 * sizeof(Real) - 1)); }
  friend RNNFAST_INLINE Vec abs(Vec a) { return Native(Mask(a.v) & ~sign_bit()); }
  friend RNNFAST_INLINE Vec copysign(Vec magnitude, Vec sign) {
    return Native((Mask(magnitude.v) & ~sign_bit()) | (Mask(sign.v) & sign_bit()));
  }
};

// Keeps a vector in a register. What two or three instructions use, GCC reads from memory for each of them: more loads
// than there are ports for.
template <class Native>
RNNFAST_INLINE void keep_in_register([[maybe_unused]] Native& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__SSE2__)
  asm("" : "+x"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
