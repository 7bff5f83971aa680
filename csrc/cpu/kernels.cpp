// Compiled once per instruction set, with RNNFAST_ISA naming it and the matching compiler flags. Everything
// but the table at the end has a name of that instruction set's own.
#include "kernels.h"

#include "backward.h"
#include "forward.h"

namespace rnnfast::cpu {
namespace RNNFAST_ISA {
namespace {

template <class Real>
void evaluate(Function function, Index count, const Real* x, Real* y) {
  using V = Vec<Real>;
  for (Index n = 0; n < count; n += V::width) {
    const Index lanes = count - n;
    const V value = V::load(x + n, lanes);
    switch (function) {
      case Function::exp: exp(value).store(y + n, lanes); break;
      case Function::sigmoid: sigmoid(value).store(y + n, lanes); break;
      case Function::tanh: tanh(value).store(y + n, lanes); break;
    }
  }
}

// Makes the compiler believe that the value is used, without moving it out of its register.
template <class Real>
RNNFAST_INLINE void keep(Vec<Real>& value) {
#if defined(__aarch64__)
  asm volatile("" : "+w"(value.v));
#elif defined(__AVX512F__)
  asm volatile("" : "+v"(value.v));
#else
  asm volatile("" : "+x"(value.v));
#endif
}

template <class Element>
double fma_loop(Index iterations) {
  using V = Vec<SumOf<Element>>;
  constexpr int chains = tile_rows * tile_vectors;  // as many as a tile has
  V sum[chains];
#pragma GCC unroll 32
  for (V& chain : sum) chain = V(SumOf<Element>(0));
  Vec<Element> a(typename Vec<Element>::Native{}), b = a;
  keep(a);
  keep(b);
  for (Index i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int chain = 0; chain < chains; ++chain) {
      sum[chain] = multiply_add(a, b, sum[chain]);
      keep(sum[chain]);
    }
  }
  return 2.0 * terms_in<Element> * chains * V::width * double(iterations);
}

template <class Real>
Real sum(Index count, const Real* x) {
  using V = Vec<Real>;
  constexpr Index chains = 8;
  V sums[chains];
#pragma GCC unroll 8
  for (V& chain : sums) chain = V(Real(0));
  Index n = 0;
  for (; n + chains * V::width <= count; n += chains * V::width) {
#pragma GCC unroll 8
    for (Index chain = 0; chain < chains; ++chain)
      sums[chain] = sums[chain] + V::load(x + n + chain * V::width);
  }
  for (; n < count; n += V::width) sums[0] = sums[0] + V::load(x + n, count - n);
  Real total(0);
#pragma GCC unroll 8
  for (const V& chain : sums)
    for (Index lane = 0; lane < V::width; ++lane) total += chain.v[lane];
  return total;
}

template <class Storage>
constexpr LayerKernels<Storage> layers() {
  using Element = ElementOf<Storage>;
  return {layer_forward<Storage>, layer_backward<Storage>, engine<Element>, fma_loop<Element>};
}

template <class Real>
constexpr KernelsFor<Real> table() {
  return {layers<Real>(), evaluate<Real>, sum<Real>};
}

}  // namespace
}  // namespace RNNFAST_ISA

#define RNNFAST_NAME_(isa) #isa
#define RNNFAST_NAME(isa) RNNFAST_NAME_(isa)
#define RNNFAST_TABLE_(isa) kernels_##isa
#define RNNFAST_TABLE(isa) RNNFAST_TABLE_(isa)

extern const Kernels RNNFAST_TABLE(RNNFAST_ISA);
const Kernels RNNFAST_TABLE(RNNFAST_ISA){RNNFAST_NAME(RNNFAST_ISA), RNNFAST_ISA::table<float>(),
                                         RNNFAST_ISA::table<double>(), RNNFAST_ISA::layers<BFloat16>()};

}  // namespace rnnfast::cpu
