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
  static RNNFAST_DEVICE Real taken(Real number) { return Tile::taken(number); }  // as it lies in vectors

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
        for (int tile = 0; tile < tiles; ++tile)
          Tile::template multiply<true>(weights.of[group][tile][i], v, total[group][tile]);
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

// Four lanes share the terms of a unit, or of two units, so that there are not more than eight warps. They add up, and
// then have a column's cells each, or, of one column, a unit's; so some have the same.
template <class Problem, int columns_>
struct LocalFma {
  using Real = typename Problem::Real;
  using State = StateOf<Real>;
  static constexpr int sums = Problem::sums, lanes = 4, columns = columns_;
  static constexpr int rows = Problem::units > 64 ? 2 : 1;  // units that lanes share
  static constexpr int cells = columns == 1 ? 1 : rows, lane_columns = 1;
  static constexpr bool is_built = true;
  static constexpr int warp_units = 32 / lanes * rows, warps = Problem::units / warp_units;
  static constexpr int chunk = 16 / sizeof(Real), chunks = Problem::terms / lanes / chunk;
  static constexpr int chains = sums == 1 ? 4 / rows : 1;  // of additions, where there would be but one or two
  static_assert(columns == 1 || columns == lanes, "a cell for each lane, or one for all");

  struct alignas(16) Chunk {
    Real of[chunk];
  };

  static constexpr int packs = rows * sums * chunks, pack_warps = warps;
  struct Weights {
    State of[rows][sums][chunks][chunk];
  };

  static RNNFAST_DEVICE int first_unit(int warp, int lane) {
    const int first = warp * warp_units + lane / lanes * rows;
    return columns == 1 && rows == 2 ? first + lane % lanes / 2 : first;
  }
  static RNNFAST_DEVICE int unit(int cell) { return cell; }
  static RNNFAST_DEVICE int column(int, int lane, int) { return columns == 1 ? 0 : lane % lanes; }
  static RNNFAST_DEVICE bool keeps(int lane) { return columns > 1 || lane % (lanes / rows) == 0; }
  static RNNFAST_DEVICE Real taken(Real number) { return number; }

  template <class Weight>
  static RNNFAST_DEVICE uint4 pack(int n, int warp, int lane, Weight&& weight) {
    const int unit = warp * warp_units + lane / lanes * rows + n / chunks / sums;
    Chunk chunk_of;
    for (int k = 0; k < chunk; ++k)
      chunk_of.of[k] = weight(unit, n / chunks % sums, (n % chunks * lanes + lane % lanes) * chunk + k);
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
      for (int k = 0; k < chunk; ++k)
        weights.of[n / chunks / sums][n / chunks % sums][n % chunks][k] = widen(chunk_of.of[k]);
    }
  }

  static RNNFAST_DEVICE void multiply(const Weights& weights, const Real* vectors, int stride, int, int lane,
                                      State (&out)[cells][sums]) {
    State total[rows][sums][columns][chains] = {};
    RNNFAST_UNROLL
    for (int i = 0; i < chunks; ++i) {
      RNNFAST_UNROLL
      for (int n = 0; n < columns; ++n) {
        const Chunk v = load_shared(
            reinterpret_cast<const Chunk*>(vectors + n * stride + (i * lanes + lane % lanes) * chunk));
        RNNFAST_UNROLL
        for (int k = 0; k < chunk; ++k) {
          RNNFAST_UNROLL
          for (int row = 0; row < rows; ++row) {
            RNNFAST_UNROLL
            for (int sum = 0; sum < sums; ++sum) {
              State& of = total[row][sum][n][k % chains];
              of = std::fma(weights.of[row][sum][i][k], widen(v.of[k]), of);
            }
          }
        }
      }
    }
    RNNFAST_UNROLL
    for (int sum = 0; sum < sums; ++sum) {
      State own[rows][columns];
      RNNFAST_UNROLL
      for (int row = 0; row < rows; ++row) {
        RNNFAST_UNROLL
        for (int n = 0; n < columns; ++n) {
          own[row][n] = total[row][sum][n][0];
          RNNFAST_UNROLL
          for (int k = 1; k < chains; ++k) own[row][n] += total[row][sum][n][k];
        }
      }
      if constexpr (columns > 1) {
        RNNFAST_UNROLL
        for (int row = 0; row < rows; ++row) out[row][sum] = handed_out(own[row], lane);
      } else if constexpr (rows == 2) {
        const bool second = lane & 2;
        const State mine = second ? own[1][0] : own[0][0], theirs = second ? own[0][0] : own[1][0];
        out[0][sum] = added(mine + exchange_lanes(theirs, 2), 1);
      } else {
        out[0][sum] = added(added(own[0][0], 2), 1);
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
  constexpr int request_ahead = 6;  // steps that take as long as memory
  constexpr int stride = vector_stride(Problem::terms, sizeof(Real)), vector_numbers = Engine::columns * stride;
  const int direction = computed_once(block_index().z);
  const typename Step::Layer layer = args.layers[direction];
  const Step step{args.shape, layer, args.carries[direction]};
  const CellPlace on = step.places_on(1), far = step.places_on(request_ahead);
  const int steady_begin = step.steady_begin();
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, terms = step.terms();
  const int first_column = block_index().y * Engine::columns, H = int(args.shape.H);
  Real* vectors = reinterpret_cast<Real*>(shared_memory_once());  // (2, columns, stride)

  typename Engine::Weights weights;
  Engine::load(args.weights[direction], warp, lane, weights);
  for (int at = thread; at < 2 * vector_numbers; at += Engine::warps * 32) {
    const int n = first_column + at / stride, k = at % stride;
    const bool is_initial = at < vector_numbers && n < args.tiling.columns && k < terms && step.is_initial(0);
    store_shared(vectors + at, is_initial ? Engine::taken(step.initial(n, k)) : Real{});
  }

  // What there is not computes along with zeros; whose column there is not, as if it were the first one.
  const int first_unit = Engine::first_unit(warp, lane);
  int index[lane_columns];
  bool has_column[lane_columns];
  typename Step::Column column[lane_columns];
  CellPlace place[lane_columns];  // of the lane's first unit in this step
  RNNFAST_UNROLL
  for (int n = 0; n < lane_columns; ++n) {
    index[n] = first_column + Engine::column(warp, lane, n);
    has_column[n] = index[n] < args.tiling.columns;
    if (!has_column[n]) index[n] = 0;
    column[n] = step.column(index[n]);
    place[n] = step.place(0, column[n], first_unit);
  }
  bool exists[cells];
  State state[cells] = {};
  RNNFAST_UNROLL
  for (int i = 0; i < cells; ++i) {
    const int n = i % lane_columns, unit = first_unit + Engine::unit(i);
    exists[i] = has_column[n] && unit < H;
    if (Step::has_state && exists[i]) state[i] = step.state_before(0, index[n], unit);
  }
  // What a cell reads comes a step ahead.
  const auto load = [&](int p, const CellPlace& further, typename Step::Inputs (&to)[cells]) {
    with_steadiness(step, p, steady_begin, [&](auto steady) {
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i) {
        const int n = i % lane_columns, unit = Engine::unit(i);
        if (exists[i])
          to[i] = step.template load<steady.value>(p, column[n], first_unit + unit, place[n] + further + unit);
      }
    });
  };
  typename Step::Inputs ahead[cells] = {};
  load(0, {0, 0}, ahead);
  const bool keeps = Engine::keeps(lane);
  Real *arrived = vectors, *sent = vectors + vector_numbers;
  sync_block();

  typename Step::Outputs outputs[cells] = {};
  RNNFAST_ROLL
  for (int p = 0; p < args.end; ++p) {
    typename Step::Inputs inputs[cells];
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i) inputs[i] = ahead[i];
    if (p + 1 < args.end) load(p + 1, on, ahead);
    if (args.from_memory && p + request_ahead < args.end) {
      with_steadiness(step, p + request_ahead, steady_begin, [&](auto steady) {
        RNNFAST_UNROLL
        for (int n = 0; n < lane_columns; ++n)
          if (steady.value && exists[n]) step.request(place[n] + far);
      });
    }
    State total[cells][sums];
    Engine::multiply(weights, arrived, stride, warp, lane, total);
    with_steadiness(step, p, steady_begin, [&](auto steady) {
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i)
        outputs[i] = step.template compute<steady.value>(p, column[i % lane_columns], inputs[i], total[i], state[i]);
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i) {
        if (!exists[i] || !keeps) continue;
        // Of a cell that sends nothing these are zeros.
        Real* to = sent + Engine::column(warp, lane, i % lane_columns) * stride;
        step.for_each_sent(first_unit + Engine::unit(i), outputs[i],
                           [&](int k, Real value) { store_shared(to + k, Engine::taken(value)); });
      }
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i) {
        const int n = i % lane_columns, unit = Engine::unit(i);
        if (exists[i] && keeps && (steady.value || step.has_cell(p, column[n])))
          step.template store<steady.value>(p, column[n], index[n], first_unit + unit, place[n] + unit, outputs[i],
                                            state[i], true);
      }
    });
    RNNFAST_UNROLL
    for (int n = 0; n < lane_columns; ++n) place[n] = place[n] + on;
    Real* const read_by_all = arrived;
    arrived = sent;
    sent = read_by_all;
    sync_block();
  }

  RNNFAST_UNROLL
  for (int i = 0; i < cells; ++i) {
    const int n = i % lane_columns, unit = first_unit + Engine::unit(i);
    if (!exists[i] || !keeps) continue;
    step.finish(column[n], unit, outputs[i]);
    if (Step::has_state) step.keep_state(index[n], unit, state[i]);
  }
}

}  // namespace rnnfast::cuda
