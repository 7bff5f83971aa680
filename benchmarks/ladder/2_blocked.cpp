// Rung 2: the same loops in an order that suits vectors and caches. Still plain C++; the compiler does
// the rest.
//
// Only h[t-1] W_hh^T has to wait for the step before: x W_ih^T is one product over all steps. In both
// products the innermost loop now runs over columns. Each of its sums is another one's neighbour in
// memory and waits for none of them, so the compiler makes vectors of them. For that the weights are
// turned first: those that neighbouring sums need stand side by side. And the loops are cut: a block of
// weights the size of an L1 cache is used by all rows before the next one is fetched.
//
// Bound by loads: each multiply-add fetches a weight of its own, and for every four of them a sum is
// fetched and put back. Where columns are a power of two apart, a block's rows also fall into the same
// few sets of the cache.
//
// Rung 3 keeps sums in registers, uses a weight for several rows once it is loaded, and lays blocks out
// in one piece.
#include "layer.h"

namespace {

using ladder::Index;

constexpr Index block_columns = 256, block_terms = 32;  // 32 KiB of weights

// to (columns, rows) = from (rows, columns), turned by squares: a cache line is used up while it is there.
void turn(Index rows, Index columns, const float* from, float* to) {
  constexpr Index side = 16;
  for (Index r0 = 0; r0 < rows; r0 += side)
    for (Index c0 = 0; c0 < columns; c0 += side)
      for (Index c = c0; c < std::min(c0 + side, columns); ++c)
        for (Index r = r0; r < std::min(r0 + side, rows); ++r) to[c * rows + r] = from[r * columns + c];
}

// sum[0..columns) += a[0..terms) . w, four terms each time it passes by; rows of w are `stride` floats apart.
void add_terms(Index terms, Index columns, const float* a, const float* w, Index stride,
               float* __restrict sum) {
  Index k = 0;
  for (; k + 4 <= terms; k += 4) {
    const float *w0 = w + k * stride, *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    for (Index n = 0; n < columns; ++n)
      sum[n] = sum[n] + a[k] * w0[n] + a[k + 1] * w1[n] + a[k + 2] * w2[n] + a[k + 3] * w3[n];
  }
  for (; k < terms; ++k)
    for (Index n = 0; n < columns; ++n) sum[n] += a[k] * w[k * stride + n];
}

// sums (rows, columns) += a (rows, terms) . w (terms, columns), block by block.
void add_product(Index rows, Index columns, Index terms, const float* a, const float* w, float* sums) {
  for (Index n = 0; n < columns; n += block_columns) {
    const Index wide = std::min(block_columns, columns - n);
    for (Index k = 0; k < terms; k += block_terms) {
      const Index deep = std::min(block_terms, terms - k);
      for (Index r = 0; r < rows; ++r)
        add_terms(deep, wide, a + r * terms + k, w + k * columns + n, columns, sums + r * columns + n);
    }
  }
}

}  // namespace

void blocked(const ladder::Layer& layer) {
  const Index T = layer.T, B = layer.B, I = layer.I, H = layer.H;
  ladder::Array w_ih(I * 4 * H), w_hh(H * 4 * H), a(T * B * 4 * H);
  turn(4 * H, I, layer.w_ih, w_ih.data());
  turn(4 * H, H, layer.w_hh, w_hh.data());
  std::copy_n(layer.c0, B * H, layer.c);
  for (Index row = 0; row < T * B; ++row) std::copy_n(layer.bias, 4 * H, &a[row * 4 * H]);
  add_product(T * B, 4 * H, I, layer.x, w_ih.data(), a.data());
  for (Index t = 0; t < T; ++t) {
    float* step = &a[t * B * 4 * H];
    add_product(B, 4 * H, H, layer.h_before(t), w_hh.data(), step);
    cells(layer, t, step, 4 * H);
  }
}
