// The products of a step as one warp computes them: its share of the terms of all the block's sums.
//
// Inputs are loaded in groups, and two groups take turns: while one is multiplied the other is on its way, so
// that a trip to L2 is waited for once for as many steps over k as registers can hold inputs for.
#pragma once

#include "weights.h"

namespace rnnfast::cuda {

// The products of one item with so many tiles of columns, and what they read.
template <class Recurrence, int tiles>
struct Products {
  using Engine = typename Recurrence::Engine;
  using Inputs = typename Engine::Inputs;
  using Item = typename Recurrence::Item;
  using Real = typename Engine::Real;
  using State = typename Engine::State;
  static constexpr int row_tiles = Engine::row_tiles, bundle_rows = Recurrence::bundle_rows;
  static constexpr int each = Recurrence::each, resident_steps = Engine::resident_tiles / row_tiles;
  static constexpr int group_steps = Engine::inputs_ahead / tiles;  // over k, whose inputs are loaded together
  static_assert(group_steps <= zero_steps, "zeros must suffice");

  struct Group {
    Inputs inputs[group_steps][tiles];
  };

  const Recurrence& of;
  typename Engine::Columns sources[tiles];
  Group even, odd;  // take turns

  RNNFAST_DEVICE explicit Products(const Recurrence& recurrence) : of(recurrence) {}

  RNNFAST_DEVICE void find_sources(const Item& item) {
    RNNFAST_UNROLL
    for (int c = 0; c < tiles; ++c)
      sources[c] = Engine::columns(of.lane, [&](int n) {
        return of.source(item.p, item.pass_begin + c * Engine::tile_columns + n) + of.warp * Engine::step;
      });
  }

  RNNFAST_DEVICE void load(int i, Group& group) const {
    if (i >= of.tiling.k_steps) return;
    RNNFAST_UNROLL
    for (int j = 0; j < group_steps; ++j) {
      RNNFAST_UNROLL
      for (int c = 0; c < tiles; ++c)
        group.inputs[j][c] = Engine::template load<typename Recurrence::From>(
            sources[c], i * each, j * each, i + j < of.valid_steps, of.zero_vector);
    }
  }

  // Reads again until all has arrived.
  RNNFAST_DEVICE void await(int i, Group& group) const {
    if (!of.args.may_be_early) return;
    for (;;) {
      Arrivals<Real> arrivals;
      RNNFAST_UNROLL
      for (int j = 0; j < group_steps; ++j) {
        RNNFAST_UNROLL
        for (int c = 0; c < tiles; ++c) Engine::look(group.inputs[j][c], arrivals);
      }
      if (!any_lane_waits(arrivals.are_missing())) return;
      relax();
      load(i, group);
    }
  }

  // The first inputs of a bundle.
  RNNFAST_DEVICE void begin() {
    load(0, even);
    load(group_steps, odd);
  }

  // The sums of this warp's tiles over its share of the terms, to `partials`. The first inputs are on their way,
  // if there are several passes, and those of `next` are then.
  RNNFAST_DEVICE void run(const typename Weights<Engine>::Resident& resident, const Item& item, const Item& next) {
    const Tiling& tiling = of.tiling;
    const bool stay = tiling.k_steps <= 2 * group_steps;  // inputs, in registers, for all bundles
    int at = 0;
    for (int bundle = 0; bundle < tiling.bundles; ++bundle) {
      typename Engine::Sums sums[row_tiles][tiles] = {};
      const auto multiply = [&](int i, const Group& group, auto&& weights_of) {
        RNNFAST_UNROLL
        for (int j = 0; j < group_steps; ++j) {
          if (i + j >= tiling.k_steps) break;
          RNNFAST_UNROLL
          for (int r = 0; r < row_tiles; ++r) {
            weights_of(j, r, [&](const uint4(&weights)[Engine::planes]) {
              RNNFAST_UNROLL
              for (int c = 0; c < tiles; ++c) Engine::multiply(weights, group.inputs[j][c], sums[r][c]);
            });
          }
        }
      };
      const auto from_memory = [&](int i) {
        return [&, i](int j, int r, auto&& use) {
          uint4 weights[Engine::planes];
          of.weights.fetch(at++, bundle, r, i + j, weights);
          use(weights);
        };
      };
      // What was read before anything had arrived is not worth waiting for: only the first group is read so.
      const bool early = of.one_pass() && bundle == 0;
      if (early) load(0, even);
      await(0, even);
      if (early) load(group_steps, odd);
      int i = 0;
      if (bundle == 0) {
        RNNFAST_UNROLL
        for (int first = 0; first < resident_steps; first += group_steps) {
          if (first >= tiling.k_steps) break;
          Group& now = first / group_steps % 2 == 0 ? even : odd;
          Group& other = first / group_steps % 2 == 0 ? odd : even;
          multiply(first, now, [&](int j, int r, auto&& use) {
            if (first + j < resident_steps) {
              const int tile = (first + j) * row_tiles + r;
              use(resident[tile < Engine::resident_tiles ? tile : 0]);  // never 0 for that, but the compiler asks
            } else {
              from_memory(first)(j, r, use);
            }
          });
          load(first + 2 * group_steps, now);
          if (first + group_steps < tiling.k_steps) await(first + group_steps, other);
          i = first + group_steps;
        }
      }
      constexpr bool starts_odd = (resident_steps + group_steps - 1) / group_steps % 2 == 1;
      if (starts_odd && bundle == 0 && i < tiling.k_steps) {
        multiply(i, odd, from_memory(i));
        load(i + 2 * group_steps, odd);
        if (i + group_steps < tiling.k_steps) await(i + group_steps, even);
        i += group_steps;
      }
      RNNFAST_ROLL
      for (; i < tiling.k_steps; i += 2 * group_steps) {
        multiply(i, even, from_memory(i));
        load(i + 2 * group_steps, even);
        const int second = i + group_steps;
        if (second >= tiling.k_steps) break;
        await(second, odd);
        multiply(second, odd, from_memory(second));
        load(second + 2 * group_steps, odd);
        if (second + group_steps < tiling.k_steps) await(second + group_steps, even);
      }
      if (bundle + 1 < tiling.bundles && !stay) begin();
      const int pitch = of.partial_pitch;
      State* out = of.partials_of(item) + of.warp * (tiling.pass_columns * pitch) + bundle * bundle_rows;
      RNNFAST_UNROLL
      for (int c = 0; c < tiles; ++c, out += Engine::tile_columns * pitch) {
        RNNFAST_UNROLL
        for (int r = 0; r < row_tiles; ++r) Engine::store(sums[r][c], out + r * Engine::tile_rows, pitch, of.lane);
      }
    }
    if (of.one_pass()) return;
    find_sources(next);
    begin();
  }
};

}  // namespace rnnfast::cuda
