// Rung 4: the cell is computed on the tile's sums, while they are in registers.
//
// For that a panel must hold whole cells: one vector of units with its four gates side by side, in
// place of four vectors of one gate. When the tile has added up its sums, they are the gates of rows x
// width cells, and exp and tanh are computed for a whole vector of them (csrc/cpu/vmath.h). The
// projection x W_ih^T goes by chunks of steps, as many as make a good number of rows: what it leaves is
// still in cache when the recurrence adds to it.
//
// With many rows, bound by the multiply-adds; the cells, packing, and waits for panels that come from
// the L3 cache stand beside them. With one row, by reading W_hh from cache once a step, and by packing,
// which a call does for a few uses of each weight.
//
// Rung 5 is the library, csrc/cpu. It packs by whole vectors, and keeps packed weights for the next
// call, on huge pages; panels are asked for ahead of time, sums cut so that they stay in L1; single
// steps are not packed. And it has threads.
#include "cpu/vmath.h"
#include "tile.h"

namespace {

using namespace ladder;

constexpr Index chunk_rows = 128;

// Weights (4, H, terms), as torch has them, in panels of whole cells: (panels, terms, 4, width).
struct Cells {
  Index panels, terms;
  Array numbers;  // units behind the last one are zero

  Cells(Index H, Index terms, const float* weights)
      : panels(ceil_div(H, width)), terms(terms), numbers(panels * terms * tile_columns) {
    for (Index gate = 0; gate < 4; ++gate) {
      for (Index first = 0; first < H; first += width) {
        float* to = &numbers[first * terms * 4 + gate * width];
        const float* from = weights + (gate * H + first) * terms;
        for (Index k = 0; k < terms; ++k)
          for (Index n = 0; n < std::min(width, H - first); ++n)
            to[k * tile_columns + n] = from[n * terms + k];
      }
    }
  }
  const float* panel(Index n) const { return &numbers[n * terms * tile_columns]; }
};

}  // namespace

void fused(const Layer& layer) {
  const Index T = layer.T, B = layer.B, I = layer.I, H = layer.H;
  const Cells w_ih(H, I, layer.w_ih), w_hh(H, H, layer.w_hh), bias(H, 1, layer.bias);
  const Index chunk = std::max<Index>(1, chunk_rows / B);
  Array projected(chunk * B * w_hh.panels * tile_columns);  // (panels, chunk, B, tile_columns)
  const auto projection = [&](Index panel, Index row) {
    return &projected[(panel * chunk * B + row) * tile_columns];
  };
  std::copy_n(layer.c0, B * H, layer.c);

  for (Index begin = 0; begin < T; begin += chunk) {
    const Index end = std::min(begin + chunk, T);
    for (Index panel = 0; panel < w_ih.panels; ++panel) {
      for_each_tile((end - begin) * B, [&](auto tile, Index row) {
        tile.load(bias.panel(panel), 0);
        tile.add_product(I, layer.x + (begin * B + row) * I, w_ih.panel(panel));
        tile.store(projection(panel, row), tile_columns);
      });
    }
    for (Index t = begin; t < end; ++t) {
      for (Index panel = 0; panel < w_hh.panels; ++panel) {
        const Index unit = panel * width, units = H - unit;  // more than a vector has: all lanes
        for_each_tile(B, [&](auto tile, Index first) {
          tile.load(projection(panel, (t - begin) * B + first), tile_columns);
          tile.add_product(H, layer.h_before(t) + first * H, w_hh.panel(panel));
          float* c = layer.c + first * H + unit;
          float* h = layer.y + (t * B + first) * H + unit;
          for (auto& [i, f, g, o] : tile.sum) {
            rnnfast::LstmGates<Vec> gate{i, f, g, o};
            Vec c_new, h_new;
            rnnfast::lstm_forward(gate, Vec::load(c, units), c_new, h_new);
            c_new.store(c, units);
            h_new.store(h, units);
            c += H, h += H;
          }
        });
      }
    }
  }
}
