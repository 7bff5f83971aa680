// The recurrence: one launch for all steps (methods local, cluster and grid of plan.h) or for one.
//
// A step is bound by latency: the flags of the step before, then v through L2 or from shared memory, the
// products, one pass through shared memory where the warps' partial sums meet, the cell, and the stores that
// the next step waits for. The k warps of a block split the terms, so a block reads each number of v
// once, and every warp finds its part of the weights where it left it.
#pragma once

#include "backward.h"
#include "engine.h"
#include "plan.h"

namespace rnnfast::cuda {

template <class Step>
struct Arguments {
  RecurrenceShape shape;
  Tiling tiling;
  typename Step::Layer layers[2];  // one for each direction
  typename Step::Carry carries[2];
  uint4* weights[2];        // packed
  int* flags[2];            // (groups, blocks): how many steps a block has finished; null: nobody waits
  int begin, end;           // steps of this launch
  int blocks;               // of a group
  bool vector;              // sources may be read 16 bytes at a time
};

// Where the packed tile (tile, k_step) begins.
template <class Engine>
RNNFAST_DEVICE Index packed_at(const Tiling& tiling, Index tile, int k_step) {
  return (tile * tiling.k_steps * tiling.k_warps + k_step) * Engine::planes * 32;
}

template <class Engine, class Step>
RNNFAST_KERNEL(block_threads)
pack(RNNFAST_ARGUMENT Arguments<Step> args, RNNFAST_ARGUMENT Index count) {
  const int direction = block_index().z;
  const Step step{args.shape, args.layers[direction], args.carries[direction]};
  const Index at = Index(block_index().x) * block_threads + thread_index();
  if (at >= count) return;
  const int lane = int(at % 32), plane = int(at / 32 % Engine::planes);
  const int k_steps = args.tiling.k_steps * args.tiling.k_warps;
  const Index tile = at / (32 * Engine::planes);
  const Index row = tile / k_steps * Engine::tile_rows, k = tile % k_steps * Engine::step;
  const Index rows = args.shape.H * step.sums(), terms = step.terms();
  args.weights[direction][at] = Engine::pack(plane, lane, [&](int r, int n) {
    return row + r < rows && k + n < terms ? step.weight(row + r, k + n) : typename Engine::Real{};
  });
}

// Adds up the gradients of the initial state, window after window.
template <class Real>
RNNFAST_KERNEL(block_threads)
add_starts(RNNFAST_ARGUMENT Arguments<Backward<Real>> args) {
  using State = StateOf<Real>;
  const int direction = block_index().z;
  const RecurrenceBackward<Real, State>& layer = args.layers[direction];
  const typename Backward<Real>::Carry& carry = args.carries[direction];
  const Truncation truncation{args.shape.T, args.shape.k1, args.shape.k2, layer.reverse};
  const Index count = args.shape.B * args.shape.H, windows = truncation.windows_to_start();
  const Index at = Index(block_index().x) * block_threads + thread_index();
  if (at >= count) return;
  State dh(0), dc(0);
  for (Index j = 0; j < windows; ++j) {
    dh += carry.starts[j * count + at];
    if (layer.dc0) dc += carry.dc[j * count + at];
  }
  layer.dh0[at] = narrow<Real>(dh);
  if (layer.dc0) layer.dc0[at] = dc;
}

template <class Engine, class From, class Step>
struct Recurrence {
  using Real = typename Engine::Real;
  using State = typename Engine::State;
  static constexpr bool in_shared = std::is_same<From, FromShared>::value;
  static constexpr int row_tiles = Engine::row_tiles, column_tiles = Engine::column_tiles;
  static constexpr int bundle_rows = row_tiles * Engine::tile_rows;
  static constexpr int ahead = 2;  // steps over k whose inputs are loaded together

  const Arguments<Step>& args;
  const Tiling& tiling;
  const Step step;
  const int direction, group, block, thread, lane, warp, k_warp;
  const Real** sources;       // of the group's columns
  State* partials;            // (k_warps, pass_columns, partial_stride)
  uint4* shared_weights;      // (warps, shared_tiles, planes, lanes)
  Real* vectors;              // (2, group_columns, stride), where in_shared

  RNNFAST_DEVICE explicit Recurrence(const Arguments<Step>& arguments)
      : args(arguments),
        tiling(arguments.tiling),
        step{args.shape, args.layers[block_index().z], args.carries[block_index().z]},
        direction(block_index().z),
        group(block_index().y),
        block(block_index().x),
        thread(thread_index()),
        lane(thread % 32),
        warp(thread / 32),
        k_warp(warp % tiling.k_warps) {
    unsigned char* memory = shared_memory();
    const auto take = [&](Index bytes) {
      unsigned char* taken = memory;
      memory += aligned(bytes);
      return taken;
    };
    sources = reinterpret_cast<const Real**>(take(padded_columns() * Index(sizeof(Real*))));
    partials = reinterpret_cast<State*>(take(Index(tiling.k_warps) * tiling.pass_columns *
                                             partial_stride(tiling, bundle_rows) * sizeof(State)));
    shared_weights = reinterpret_cast<uint4*>(
        take(Index(block_warps) * tiling.shared_tiles * Engine::planes * 32 * sizeof(uint4)));
    vectors = reinterpret_cast<Real*>(memory);
  }

  RNNFAST_DEVICE int padded_columns() const {
    return (tiling.group_columns + tiling.pass_columns - 1) / tiling.pass_columns * tiling.pass_columns;
  }
  RNNFAST_DEVICE int column_of(int n) const { return group * tiling.group_columns + n; }
  RNNFAST_DEVICE bool has_column(int n) const {
    return n < tiling.group_columns && column_of(n) < tiling.columns;
  }
  RNNFAST_DEVICE Real* vector_of(int p, int n) const {
    return vectors + (Index(p % 2) * tiling.group_columns + n) * tiling.stride;
  }

  // A tile's weights, wherever they lie: `at` counts this warp's tiles that are not in registers.
  RNNFAST_DEVICE void fetch(int at, int bundle, int row_tile, int i, uint4 (&weights)[Engine::planes]) const {
    if (at < tiling.shared_tiles) {
      const uint4* from = shared_weights + ((warp * tiling.shared_tiles + at) * Engine::planes * 32 + lane);
      RNNFAST_UNROLL
      for (int plane = 0; plane < Engine::planes; ++plane) weights[plane] = load_shared(from + plane * 32);
    } else {
      fetch_packed(bundle, row_tile, i, weights);
    }
  }

  RNNFAST_DEVICE void fetch_packed(int bundle, int row_tile, int i, uint4 (&weights)[Engine::planes]) const {
    const Index tile = (Index(block) * tiling.bundles + bundle) * row_tiles + row_tile;
    const uint4* from =
        args.weights[direction] + packed_at<Engine>(tiling, tile, i * tiling.k_warps + k_warp) + lane;
    RNNFAST_UNROLL
    for (int plane = 0; plane < Engine::planes; ++plane) weights[plane] = load_fresh(from + plane * 32);
  }

  using Resident = uint4[Engine::resident_tiles][Engine::planes];

  // Brings the weights to where they stay.
  RNNFAST_DEVICE void settle(Resident& resident) const {
    const int first = warp / tiling.k_warps, bundle_warps = block_warps / tiling.k_warps;
    RNNFAST_UNROLL
    for (int n = 0; n < Engine::resident_tiles; ++n)
      if (n / row_tiles < tiling.register_steps && first < tiling.bundles)
        fetch_packed(first, n % row_tiles, n / row_tiles, resident[n]);
    int at = 0;
    for (int bundle = first; bundle < tiling.bundles; bundle += bundle_warps) {
      for (int i = bundle == first ? tiling.register_steps : 0; i < tiling.k_steps; ++i) {
        for (int row_tile = 0; row_tile < row_tiles && at < tiling.shared_tiles; ++row_tile, ++at) {
          uint4 weights[Engine::planes];
          fetch_packed(bundle, row_tile, i, weights);
          uint4* to = shared_weights + ((warp * tiling.shared_tiles + at) * Engine::planes * 32 + lane);
          RNNFAST_UNROLL
          for (int plane = 0; plane < Engine::planes; ++plane)
            store_shared(to + plane * 32, weights[plane]);
        }
      }
    }
  }

  // The sums of this warp's tiles over its share of the terms, for one pass over columns, to `partials`.
  RNNFAST_DEVICE void multiply(const Resident& resident, int pass_begin) const {
    using Inputs = typename Engine::Inputs;
    const int first = warp / tiling.k_warps, bundle_warps = block_warps / tiling.k_warps;
    const int stride = partial_stride(tiling, bundle_rows);
    const Index terms = step.terms();
    typename Engine::Columns columns[column_tiles];
    const auto has_tile = [&](int c) { return c * Engine::tile_columns < tiling.pass_columns; };
    RNNFAST_UNROLL
    for (int c = 0; c < column_tiles; ++c)
      if (has_tile(c))
        columns[c] = Engine::columns(sources + pass_begin + c * Engine::tile_columns, lane);
    const auto load = [&](int i, Inputs (&inputs)[column_tiles]) {
      if (i >= tiling.k_steps) return;
      const Index k = Index(i * tiling.k_warps + k_warp) * Engine::step;
      RNNFAST_UNROLL
      for (int c = 0; c < column_tiles; ++c)
        if (has_tile(c))
          inputs[c] = Engine::template load<From>(columns[c], k, terms, args.vector, lane);
    };

    int at = 0;
    for (int bundle = first; bundle < tiling.bundles; bundle += bundle_warps) {
      typename Engine::Sums sums[row_tiles][column_tiles] = {};
      const auto add = [&](const uint4(&weights)[Engine::planes], int row_tile,
                           const Inputs(&inputs)[column_tiles]) {
        RNNFAST_UNROLL
        for (int c = 0; c < column_tiles; ++c)
          if (has_tile(c)) Engine::multiply(weights, inputs[c], sums[row_tile][c]);
      };
      int i = 0;
      if (bundle == first) {
        RNNFAST_UNROLL
        for (int next = 0; next < Engine::resident_tiles / row_tiles; next += ahead) {
          if (next >= tiling.register_steps) break;
          Inputs inputs[ahead][column_tiles];
          RNNFAST_UNROLL
          for (int j = 0; j < ahead; ++j) load(next + j, inputs[j]);
          RNNFAST_UNROLL
          for (int j = 0; j < ahead; ++j) {
            if (next + j >= tiling.register_steps) break;
            RNNFAST_UNROLL
            for (int r = 0; r < row_tiles; ++r) add(resident[(next + j) * row_tiles + r], r, inputs[j]);
          }
        }
        i = tiling.register_steps;
      }
      for (; i < tiling.k_steps; i += ahead) {
        Inputs inputs[ahead][column_tiles];
        RNNFAST_UNROLL
        for (int j = 0; j < ahead; ++j) load(i + j, inputs[j]);
        RNNFAST_UNROLL
        for (int j = 0; j < ahead; ++j) {
          if (i + j >= tiling.k_steps) break;
          RNNFAST_UNROLL
          for (int r = 0; r < row_tiles; ++r, ++at) {
            uint4 weights[Engine::planes];
            fetch(at, bundle, r, i + j, weights);
            add(weights, r, inputs[j]);
          }
        }
      }
      State* out = partials + Index(k_warp) * tiling.pass_columns * stride +
                   bundle * bundle_rows;
      RNNFAST_UNROLL
      for (int r = 0; r < row_tiles; ++r) {
        RNNFAST_UNROLL
        for (int c = 0; c < column_tiles; ++c)
          if (has_tile(c))
            Engine::store(sums[r][c],
                          out + c * Engine::tile_columns * stride + r * Engine::tile_rows, stride, lane);
      }
    }
  }

  // A block's cells of one pass over columns, dealt to its threads: consecutive units to consecutive lanes.
  struct Cell {
    int n, unit_in_block, unit, column;
  };

  RNNFAST_DEVICE int units() const {
    return tiling.bundles * bundle_rows / step.sums();
  }
  RNNFAST_DEVICE Cell cell_at(int cell, int pass_begin) const {
    const int n = cell / units(), unit = cell - n * units();
    return {n, unit, block * units() + unit, column_of(pass_begin + n)};
  }
  RNNFAST_DEVICE bool is_ours(const Cell& cell, int pass_begin, int p) const {
    return cell.n < tiling.pass_columns && cell.unit < args.shape.H && has_column(pass_begin + cell.n) &&
           step.has_cell(p, cell.column);
  }

  RNNFAST_DEVICE void finish(const Cell& cell, int pass_begin, int p,
                             const typename Step::Inputs& inputs) const {
    const int stride = partial_stride(tiling, bundle_rows);
    State sums[4] = {};
    for (int k = 0; k < tiling.k_warps; ++k) {
      const State* from = partials + (Index(k) * tiling.pass_columns + cell.n) * stride +
                          cell.unit_in_block * step.sums();
      RNNFAST_UNROLL
      for (int gate = 0; gate < 4; ++gate)
        if (gate < step.sums()) sums[gate] += load_shared(from + gate);
    }
    step.finish(p, cell.column, cell.unit, inputs, sums, [&](Index k, Real value) {
      step.target(p, cell.column)[k] = value;
      if (in_shared && p + 1 < args.end) {
        Real* mine = vector_of(p + 1, pass_begin + cell.n) + k;
        if (args.blocks == 1) {
          store_shared(mine, value);
        } else {
          for (int rank = 0; rank < args.blocks; ++rank) store_peer(rank, mine, value);
        }
      }
    });
  }

  RNNFAST_DEVICE void find_sources(int p) const {
    for (int n = thread; n < padded_columns(); n += block_threads) {
      const Real* source = nullptr;
      if (has_column(n) && step.arrives(p, column_of(n)))
        source = in_shared ? vector_of(p, n) : step.source(p, column_of(n));
      store_shared(sources + n, source);
    }
  }

  // Zeros to both vectors, for the numbers past the last term; and what arrives at the first step.
  RNNFAST_DEVICE void prepare_vectors() const {
    for (int at = thread; at < 2 * tiling.group_columns * tiling.stride; at += block_threads)
      store_shared(vectors + at, Real{});
    sync_block();
    for (int n = warp; n < tiling.group_columns; n += block_warps) {
      if (!has_column(n) || !step.arrives(args.begin, column_of(n))) continue;
      const Real* from = step.source(args.begin, column_of(n));
      for (Index k = lane; k < step.terms(); k += 32)
        store_shared(vector_of(args.begin, n) + k, from[k]);
    }
    sync_group();
  }

  RNNFAST_DEVICE void sync_group() const {
    if (args.blocks > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
  }

  // Until every block of the group has finished step p - 1; also a barrier of the block.
  RNNFAST_DEVICE void wait(int p) const {
    if (args.flags[direction] && p > args.begin && warp == 0) {
      const int* flags = args.flags[direction] + group * args.blocks;
      for (int peer = lane; peer < args.blocks; peer += 32)
        while (load_acquire(flags + peer) < p) relax();
    }
    sync_block();
  }

  RNNFAST_DEVICE void run() const {
    Resident resident;
    settle(resident);
    if (in_shared) prepare_vectors();
    for (int p = args.begin; p < args.end; ++p) {
      const Cell own = cell_at(thread, 0);
      typename Step::Inputs inputs_ahead;
      const bool has_own = is_ours(own, 0, p);
      if (has_own) inputs_ahead = step.load(p, own.column, own.unit);
      find_sources(p);
      wait(p);
      for (int pass_begin = 0; pass_begin < tiling.group_columns; pass_begin += tiling.pass_columns) {
        multiply(resident, pass_begin);
        sync_block();
        if (pass_begin == 0 && has_own) finish(own, 0, p, inputs_ahead);
        const int first = pass_begin == 0 ? thread + block_threads : thread;
        for (int n = first; n < units() * tiling.pass_columns; n += block_threads) {
          const Cell cell = cell_at(n, pass_begin);
          if (is_ours(cell, pass_begin, p))
            finish(cell, pass_begin, p, step.load(p, cell.column, cell.unit));
        }
        if (in_shared && pass_begin + tiling.pass_columns >= tiling.group_columns) {
          sync_group();
        } else {
          sync_block();
        }
      }
      if (args.flags[direction] && thread == 0)
        store_release(args.flags[direction] + group * args.blocks + block, p + 1);
    }
  }
};

template <class Engine, class From, class Step>
RNNFAST_KERNEL(block_threads)
recur(RNNFAST_ARGUMENT Arguments<Step> args) {
  if constexpr (Engine::is_built) {
    const Recurrence<Engine, From, Step> recurrence(args);
    recurrence.run();
  } else {
    fail();
  }
}

}  // namespace rnnfast::cuda
