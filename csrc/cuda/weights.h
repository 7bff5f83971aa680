// W_hh as a warp finds it: packed in the order in which lanes want it, in registers as far as these reach, then in
// shared memory, and from L2 in every step beyond that.
#pragma once

#include "arguments.h"
#include "engine.h"

namespace rnnfast::cuda {

// Where the packed tile (tile, k_step) begins.
template <class Engine>
RNNFAST_DEVICE Index packed_at(const Tiling& tiling, Index tile, int k_step) {
  return (tile * tiling.k_steps * block_warps + k_step) * Engine::planes * 32;
}

template <class Engine>
struct Weights {
  const Tiling& tiling;
  const uint4* packed;
  uint4* shared;  // (warps, shared_tiles, planes, lanes)
  int block, warp, lane;

  static constexpr int row_tiles = Engine::row_tiles;
  using Resident = uint4[Engine::resident_tiles][Engine::planes];

  // A tile, wherever it lies: `at` counts this warp's tiles that are not in registers.
  RNNFAST_DEVICE void fetch(int at, int bundle, int row_tile, int i, uint4 (&weights)[Engine::planes]) const {
    if (at < tiling.shared_tiles) {
      const uint4* from = shared + ((warp * tiling.shared_tiles + at) * (Engine::planes * 32) + lane);
      RNNFAST_UNROLL
      for (int plane = 0; plane < Engine::planes; ++plane) weights[plane] = load_shared(from + plane * 32);
    } else {
      fetch_packed(bundle, row_tile, i, weights);
    }
  }

  RNNFAST_DEVICE void fetch_packed(int bundle, int row_tile, int i, uint4 (&weights)[Engine::planes]) const {
    const Index tile = (Index(block) * tiling.bundles + bundle) * row_tiles + row_tile;
    const uint4* from =
        packed + packed_at<Engine>(tiling, tile, i * block_warps + warp) + lane;
    RNNFAST_UNROLL
    for (int plane = 0; plane < Engine::planes; ++plane) weights[plane] = load_global(from + plane * 32);
  }

  // Brings the weights to where they stay.
  RNNFAST_DEVICE void settle(Resident& resident) const {
    RNNFAST_UNROLL
    for (int n = 0; n < Engine::resident_tiles; ++n)
      if (n / row_tiles < tiling.register_steps)
        fetch_packed(0, n % row_tiles, n / row_tiles, resident[n]);
    int at = 0;
    for (int bundle = 0; bundle < tiling.bundles; ++bundle) {
      for (int i = bundle == 0 ? tiling.register_steps : 0; i < tiling.k_steps; ++i) {
        for (int row_tile = 0; row_tile < row_tiles && at < tiling.shared_tiles; ++row_tile, ++at) {
          uint4 weights[Engine::planes];
          fetch_packed(bundle, row_tile, i, weights);
          uint4* to = shared + ((warp * tiling.shared_tiles + at) * (Engine::planes * 32) + lane);
          RNNFAST_UNROLL
          for (int plane = 0; plane < Engine::planes; ++plane)
            store_shared(to + plane * 32, weights[plane]);
        }
      }
    }
  }
};

}  // namespace rnnfast::cuda
