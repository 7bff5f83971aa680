// A layer so small that a block's registers hold all of its weights: the method local. Every block has batch rows of
// its own, and none meets another.
//
// Such a step is not a matter of bandwidth but of how many instructions follow each other. So the rows of weights are
// dealt out such that the sums of a cell end in one lane: only vectors go through shared memory, two in turn, with one
// barrier in a step; cell states stay in registers; and what cells read of other memory comes a step ahead.
#pragma once

#include "arguments.h"
#include "engine.h"

namespace rnnfast::cuda {

// Units, rounded up, that there are kernels for; sums a unit has; its rows' terms are a multiple of the units.
template <class Real_, int units_, int sums_, int terms_>
struct LocalProblem {
  using Real = Real_;
  static constexpr int units = units_, sums = sums_, terms = terms_;
};

// On tensor cores. The lane with row index g and column index j (engine.h) gets rows g and g + 8 of a tile in columns
// 2 j and 2 j + 1: two units, or two gates of one unit, whose other gates are in a second tile. Where there are too
// few tiles for all warps, two warps multiply the same ones, and have the cells of one of these columns each.
template <class Problem>
struct LocalMma {
  using Real = typename Problem::Real;
  using State = float;
  using Tile = Mma<Real, 1>;
  static constexpr int sums = Problem::sums, tiles = sums == 4 ? 2 : 1;
  static constexpr int group_units = sums == 4 ? 8 : 16;  // that tiles side by side have rows of
  static constexpr int all_groups = Problem::units / group_units, twins = all_groups < block_warps ? 2 : 1;
  static constexpr int warps = all_groups < block_warps ? all_groups * twins : block_warps;
  static constexpr int groups = all_groups * twins / warps;  // of a warp
  static constexpr int steps = Problem::terms / Tile::step, columns = Tile::tile_columns;
  static constexpr int lane_columns = 2 / twins, group_cells = (sums == 4 ? 1 : 2) * lane_columns;
  static constexpr int cells = groups * group_cells;  // of a lane
  static constexpr bool is_built = has_tensor_cores;

  static constexpr int packs = groups * tiles * steps * Tile::planes, pack_warps = warps / twins;
  struct Weights {
    uint4 of[groups][tiles][steps][Tile::planes];
  };

  // Of a lane's cells, in this order: the unit, from its first one on, and the column.
  static RNNFAST_DEVICE int first_unit(int warp, int lane) { return warp / twins * groups * group_units + lane / 4; }
  static RNNFAST_DEVICE int unit(int cell) {
    return cell / group_cells * group_units + cell % group_cells / lane_columns * 8;
  }
  static RNNFAST_DEVICE int column(int warp, int lane, int n) { return lane % 4 * 2 + (twins == 2 ? warp % 2 : n); }
  static RNNFAST_DEVICE bool keeps(int) { return true; }

  // A lane's weights, 16 bytes at a time: number n of `packs`. weight(unit, sum, k).
  template <class Weight>
  static RNNFAST_DEVICE uint4 pack(int n, int warp, int lane, Weight&& weight) {
    const int plane = n % Tile::planes, i = n / Tile::planes % steps, tile = n / Tile::planes / steps % tiles;
    const int first = (warp * groups + n / Tile::planes / steps / tiles) * group_units;
    return Tile::pack(plane, lane, [&](int r, int k) {
      return sums == 4 ? weight(first + r % 8, tile * 2 + r / 8, i * Tile::step + k)
                       : weight(first + r, 0, i * Tile::step + k);
    });
  }
  static RNNFAST_DEVICE void load(const uint4* packed, int warp, int lane, Weights& weights) {
    const uint4* from = packed + warp / twins * packs * 32 + lane;
    RNNFAST_UNROLL
    for (int n = 0; n < packs; ++n)
      weights.of[n / Tile::planes / steps / tiles][n / Tile::planes / steps % tiles][n / Tile::planes % steps]
                [n % Tile::planes] = load_global(from + n * 32);
  }

  static RNNFAST_DEVICE void multiply(const Weights& weights, const Real* vectors, int stride, int warp, int lane,
                                      State (&out)[cells][sums]) {
    typename Tile::Sums total[groups][tiles] = {};
    const Real* from = vectors + lane / 4 * stride + Tile::first(lane);
    RNNFAST_UNROLL
    for (int i = 0; i < steps; ++i) {
      const uint4 v = load_shared(reinterpret_cast<const uint4*>(from + i * Tile::step));
      RNNFAST_UNROLL
      for (int group = 0; group < groups; ++group) {
        RNNFAST_UNROLL
        for (int tile = 0; tile < tiles; ++tile) Tile::multiply(weights.of[group][tile][i], v, total[group][tile]);
      }
    }
    RNNFAST_UNROLL
    for (int cell = 0; cell < cells; ++cell) {
      RNNFAST_UNROLL
      for (int sum = 0; sum < sums; ++sum) {
        const auto& tile = total[cell / group_cells][sum / 2];
        const int half = sums == 4 ? sum % 2 : cell % group_cells / lane_columns;
        const auto in_column = [&](int n) { return tile.of(half * 2 + n); };
        if (twins == 2) {
          out[cell][sum] = warp % 2 ? in_column(1) : in_column(0);
        } else {
          out[cell][sum] = in_column(cell % 2);
        }
      }
    }
  }
};

// Four lanes share the terms of a unit. They add up, and then have a column's cell each, or all the same.
template <class Problem, int columns_>
struct LocalFma {
  using Real = typename Problem::Real;
  using State = StateOf<Real>;
  static constexpr int sums = Problem::sums, lanes = 4, columns = columns_, cells = 1, lane_columns = 1;
  static constexpr bool is_built = true;
  static constexpr int warp_units = 32 / lanes, warps = Problem::units / warp_units;
  static constexpr int chunk = 16 / sizeof(Real), chunks = Problem::terms / lanes / chunk;
  static constexpr int chains = sums == 1 ? 4 : 1;  // of additions, where there would be but one
  static_assert(columns == 1 || columns == lanes, "a cell for each lane, or one for all");

  struct alignas(16) Chunk {
    Real of[chunk];
  };

  static constexpr int packs = sums * chunks, pack_warps = warps;
  struct Weights {
    State of[sums][chunks][chunk];
  };

  static RNNFAST_DEVICE int first_unit(int warp, int lane) { return warp * warp_units + lane / lanes; }
  static RNNFAST_DEVICE int unit(int) { return 0; }
  static RNNFAST_DEVICE int column(int, int lane, int) { return columns == 1 ? 0 : lane % lanes; }
  static RNNFAST_DEVICE bool keeps(int lane) { return columns > 1 || lane % lanes == 0; }

  template <class Weight>
  static RNNFAST_DEVICE uint4 pack(int n, int warp, int lane, Weight&& weight) {
    Chunk chunk_of;
    for (int k = 0; k < chunk; ++k)
      chunk_of.of[k] = weight(first_unit(warp, lane), n / chunks, (n % chunks * lanes + lane % lanes) * chunk + k);
    uint4 packed;
    memcpy(&packed, &chunk_of, sizeof(packed));
    return packed;
  }
  static RNNFAST_DEVICE void load(const uint4* packed, int warp, int lane, Weights& weights) {
    const uint4* from = packed + warp * packs * 32 + lane;
    RNNFAST_UNROLL
    for (int n = 0; n < packs; ++n) {
      const uint4 bits = load_global(from + n * 32);
      Chunk chunk_of;
      memcpy(&chunk_of, &bits, sizeof(bits));
      RNNFAST_UNROLL
      for (int k = 0; k < chunk; ++k) weights.of[n / chunks][n % chunks][k] = widen(chunk_of.of[k]);
    }
  }

  static RNNFAST_DEVICE void multiply(const Weights& weights, const Real* vectors, int stride, int, int lane,
                                      State (&out)[cells][sums]) {
    State total[sums][columns][chains] = {};
    RNNFAST_UNROLL
    for (int i = 0; i < chunks; ++i) {
      RNNFAST_UNROLL
      for (int n = 0; n < columns; ++n) {
        const Chunk v = load_shared(
            reinterpret_cast<const Chunk*>(vectors + n * stride + (i * lanes + lane % lanes) * chunk));
        RNNFAST_UNROLL
        for (int k = 0; k < chunk; ++k) {
          RNNFAST_UNROLL
          for (int sum = 0; sum < sums; ++sum) {
            State& of = total[sum][n][k % chains];
            of = std::fma(weights.of[sum][i][k], widen(v.of[k]), of);
          }
        }
      }
    }
    RNNFAST_UNROLL
    for (int sum = 0; sum < sums; ++sum) {
      State own[columns];
      RNNFAST_UNROLL
      for (int n = 0; n < columns; ++n) {
        own[n] = total[sum][n][0];
        RNNFAST_UNROLL
        for (int k = 1; k < chains; ++k) own[n] += total[sum][n][k];
      }
      if constexpr (columns == 1) {
        out[0][sum] = added(added(own[0], 2), 1);
      } else {
        out[0][sum] = handed_out(own, lane);
      }
    }
  }

 private:
  static RNNFAST_DEVICE State added(State mine, int partner) { return mine + exchange_lanes(mine, partner); }

  // Lane n of the four gets the sum over the four lanes of column n.
  static RNNFAST_DEVICE State handed_out(const State (&sum)[columns], int lane) {
    const bool second = lane & 2, odd = lane & 1;
    State pair[2];
    RNNFAST_UNROLL
    for (int n = 0; n < 2; ++n) {
      const State kept = second ? sum[columns / 2 + n] : sum[n];
      pair[n] = kept + exchange_lanes(second ? sum[n] : sum[columns / 2 + n], 2);
    }
    return (odd ? pair[1] : pair[0]) + exchange_lanes(odd ? pair[0] : pair[1], 1);
  }
};

// Weights in the order in which lanes want them.
template <class Engine, class Step>
RNNFAST_KERNEL(block_threads)
pack_locally(RNNFAST_ARGUMENT Arguments<Step> args) {
  using Real = typename Engine::Real;
  const int direction = block_index().z;
  const Step step{args.shape, args.layers[direction], args.carries[direction]};
  const int at = block_index().x * block_threads + thread_index();
  const int lane = at % 32, n = at / 32 % Engine::packs, warp = at / 32 / Engine::packs;
  if (warp >= Engine::pack_warps) return;
  args.weights[direction][at] = Engine::pack(n, warp, lane, [&](int unit, int sum, int k) {
    return unit < int(args.shape.H) && k < step.terms() ? step.weight(unit, sum, k) : Real{};
  });
}

template <class Engine, class Problem, class Step>
RNNFAST_KERNEL(Engine::warps * 32)
recur_locally(RNNFAST_ARGUMENT Arguments<Step> args) {
  if constexpr (!Engine::is_built) return fail();
  using Real = typename Engine::Real;
  using State = typename Engine::State;
  constexpr int cells = Engine::cells, sums = Engine::sums, lane_columns = Engine::lane_columns;
  constexpr int stride = vector_stride(Problem::terms, sizeof(Real)), vector_numbers = Engine::columns * stride;
  const int direction = block_index().z;
  const typename Step::Layer layer = args.layers[direction];
  const Step step{args.shape, layer, args.carries[direction]};
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, terms = step.terms();
  const int first_column = block_index().y * Engine::columns, H = int(args.shape.H);
  Real* vectors = reinterpret_cast<Real*>(shared_memory());  // (2, columns, stride)

  typename Engine::Weights weights;
  Engine::load(args.weights[direction], warp, lane, weights);
  for (int at = thread; at < 2 * vector_numbers; at += Engine::warps * 32) {
    const int n = first_column + at / stride, k = at % stride;
    const bool is_initial = at < vector_numbers && n < args.tiling.columns && k < terms && step.is_initial(0);
    store_shared(vectors + at, is_initial ? step.initial(n, k) : Real{});
  }

  // What there is not computes along, as the first of all units and columns.
  const int first_unit = Engine::first_unit(warp, lane);
  int index[lane_columns];
  bool has_column[lane_columns];
  typename Step::Column column[lane_columns];
  RNNFAST_UNROLL
  for (int n = 0; n < lane_columns; ++n) {
    index[n] = first_column + Engine::column(warp, lane, n);
    has_column[n] = index[n] < args.tiling.columns;
    if (!has_column[n]) index[n] = 0;
    column[n] = step.column(index[n]);
  }
  const auto exists = [&](int cell) { return has_column[cell % lane_columns] && first_unit + Engine::unit(cell) < H; };
  const auto unit = [&](int cell) {
    const int own = first_unit + Engine::unit(cell);
    return own < H ? own : 0;
  };
  typename Step::Inputs ahead[cells];
  State state[cells];
  RNNFAST_UNROLL
  for (int i = 0; i < cells; ++i) {
    ahead[i] = step.load(0, column[i % lane_columns], unit(i));
    state[i] = Step::has_state ? step.state_before(0, index[i % lane_columns], unit(i)) : State(0);
  }
  sync_block();

  RNNFAST_ROLL
  for (int p = 0; p < args.end; ++p) {
    typename Step::Inputs inputs[cells];
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i) inputs[i] = ahead[i];
    if (p + 1 < args.end) {
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i) ahead[i] = step.load(p + 1, column[i % lane_columns], unit(i));
    }
    State total[cells][sums];
    Engine::multiply(weights, vectors + p % 2 * vector_numbers, stride, warp, lane, total);
    typename Step::Outputs outputs[cells];
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i)
      outputs[i] = step.compute(p, column[i % lane_columns], unit(i), inputs[i], total[i], state[i]);
    Real* next = vectors + (p + 1) % 2 * vector_numbers;
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i) {
      if (!exists(i) || !Engine::keeps(lane)) continue;
      // Of a cell that sends nothing these are zeros.
      step.for_each_sent(unit(i), outputs[i], [&](int k, Real value) {
        store_shared(next + Engine::column(warp, lane, i % lane_columns) * stride + k, value);
      });
    }
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i) {
      const int n = i % lane_columns;
      if (!exists(i) || !Engine::keeps(lane) || !step.has_cell(p, column[n])) continue;
      step.store(p, column[n], index[n], unit(i), outputs[i], state[i], true);
    }
    sync_block();
  }

  if constexpr (Step::has_state) {
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i)
      if (exists(i) && Engine::keeps(lane)) step.keep_state(index[i % lane_columns], unit(i), state[i]);
  }
}

}  // namespace rnnfast::cuda
