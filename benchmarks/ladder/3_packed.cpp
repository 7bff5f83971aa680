// Rung 3: sums live in registers, and weights are packed in the order in which they are used.
//
// The register tile (tile.h) adds up a few rows by four vectors of columns over all terms before
// anything is stored. It wants its weights four vectors at a time, term by term, so that is how they
// are laid out: a panel of four vectors of columns is one run through memory, whatever its size, on as
// few pages as can be. Packing reads and writes every weight once a call; a step uses it B times.
//
// Large products are now bound by the multiply-adds. But T x B x 4H sums go out to memory and come back
// for the cells, which take them one at a time: five calls of exp and tanh a unit. With a single row a
// weight is used once a step: then reading W_hh is the bound, whatever the tile does.
//
// Rung 4 computes the cells on the tile, in vectors.
#include "tile.h"

namespace {

using namespace ladder;

struct Matrix {
  Index panels, terms;
  Array numbers;  // (panels, terms, tile_columns); columns behind the last one are zero

  // From weights (columns, terms), as torch has them.
  Matrix(Index columns, Index terms, const float* weights)
      : panels(ceil_div(columns, tile_columns)), terms(terms), numbers(panels * terms * tile_columns) {
    for (Index first = 0; first < columns; first += width) {
      float* to = &numbers[first / tile_columns * terms * tile_columns + first % tile_columns];
      const float* from = weights + first * terms;
      for (Index k = 0; k < terms; ++k)
        for (Index n = 0; n < std::min(width, columns - first); ++n)
          to[k * tile_columns + n] = from[n * terms + k];
    }
  }
  const float* panel(Index n) const { return &numbers[n * terms * tile_columns]; }
  Index stride() const { return panels * tile_columns; }
};

// sums (rows, stride) += a (rows, terms) . matrix. Panels outside: each is fetched once and used by all rows.
void add_product(Index rows, const float* a, const Matrix& matrix, float* sums) {
  for (Index panel = 0; panel < matrix.panels; ++panel) {
    for_each_tile(rows, [&](auto tile, Index first) {
      float* out = sums + first * matrix.stride() + panel * tile_columns;
      tile.load(out, matrix.stride());
      tile.add_product(matrix.terms, a + first * matrix.terms, matrix.panel(panel));
      tile.store(out, matrix.stride());
    });
  }
}

}  // namespace

void packed(const Layer& layer) {
  const Index T = layer.T, B = layer.B, I = layer.I, H = layer.H;
  const Matrix w_ih(4 * H, I, layer.w_ih), w_hh(4 * H, H, layer.w_hh);
  const Index stride = w_hh.stride();
  std::copy_n(layer.c0, B * H, layer.c);
  Array a(T * B * stride);
  for (Index row = 0; row < T * B; ++row) std::copy_n(layer.bias, 4 * H, &a[row * stride]);
  add_product(T * B, layer.x, w_ih, a.data());
  for (Index t = 0; t < T; ++t) {
    float* step = &a[t * B * stride];
    add_product(B, layer.h_before(t), w_hh, step);
    cells(layer, t, step, stride);
  }
}
