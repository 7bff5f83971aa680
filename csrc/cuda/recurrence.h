// The recurrence: one launch for all steps (methods local, cluster and grid of plan.h) or for one.
//
// A step is bound by latency: v on its way from the blocks that computed it (exchange.h), the products, one
// pass through shared memory where the warps' partial sums meet, the cell, and the stores that the next step
// waits for. So there is one barrier in a step, for the partial sums; each warp waits for its own part of v and
// no more; and whatever no other block has a part in is there before it is wanted: c stays in shared memory,
// the cells' inputs are loaded a step ahead. The k warps of a block split the terms, so a block reads each
// number of v once, and every warp finds its part of the weights where it left it.
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
  SharedLayout shared;
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
  static constexpr int ahead = Engine::ahead;
  static constexpr int resident_steps = Engine::resident_tiles / row_tiles;
  static_assert(resident_steps % (2 * ahead) == 0, "the two halves of inputs take turns");

  const Arguments<Step>& args;
  const Tiling& tiling;
  const Step step;
  const int direction, group, block, thread, lane, warp, k_warp;
  const Real** sources;   // (2, pass_columns): of this item and the next
  State* partials;        // (partial_buffers, k_warps, pass_columns, partial_stride)
  State* states;          // (group_columns, units): LSTMs only
  uint4* shared_weights;  // (warps, shared_tiles, planes, lanes)
  Real* vectors;          // (vector_slots, group_columns, stride), where in_shared

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
        k_warp(warp % tiling.k_warps),
        sources(reinterpret_cast<const Real**>(shared_memory() + args.shared.sources)),
        partials(reinterpret_cast<State*>(shared_memory() + args.shared.partials)),
        states(reinterpret_cast<State*>(shared_memory() + args.shared.states)),
        shared_weights(reinterpret_cast<uint4*>(shared_memory() + args.shared.weights)),
        vectors(reinterpret_cast<Real*>(shared_memory() + args.shared.vectors)) {}

  // What is multiplied between two barriers: `pass_columns` of the group's columns in one step.
  struct Item {
    int p, pass_begin;
    int count;  // of items before this one
  };

  RNNFAST_DEVICE Item after(const Item& item) const {
    const int next = item.pass_begin + tiling.pass_columns;
    if (next < tiling.group_columns) return {item.p, next, item.count + 1};
    return {item.p + 1, 0, item.count + 1};
  }

  RNNFAST_DEVICE bool one_pass() const { return tiling.pass_columns >= tiling.group_columns; }
  RNNFAST_DEVICE int column_of(int n) const { return group * tiling.group_columns + n; }
  RNNFAST_DEVICE bool has_column(int n) const {
    return n < tiling.group_columns && column_of(n) < tiling.columns;
  }
  RNNFAST_DEVICE Real* vector_of(int p, int n) const {
    return vectors + (Index(p % vector_slots) * tiling.group_columns + n) * tiling.stride;
  }

  // Weights

  // A tile, wherever it lies: `at` counts this warp's tiles that are not in registers.
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
    for (int plane = 0; plane < Engine::planes; ++plane) weights[plane] = load_global(from + plane * 32);
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

  // Vectors

  using Inputs = typename Engine::Inputs;

  // A warp's columns of one item.
  struct Columns {
    typename Engine::Columns tile[column_tiles];
    const Real* last;   // of them
    bool may_be_early;  // other blocks may not have written yet
  };

  // The inputs of a few steps over k.
  struct Group {
    Inputs inputs[ahead][column_tiles];
  };

  RNNFAST_DEVICE bool has_tile(int c) const { return c * Engine::tile_columns < tiling.pass_columns; }
  RNNFAST_DEVICE Index term(int i) const { return Index(i * tiling.k_warps + k_warp) * Engine::step; }

  // For `columns_of`, once a barrier has passed.
  RNNFAST_DEVICE void find_sources(const Item& item) const {
    if (thread >= tiling.pass_columns) return;
    const int n = item.pass_begin + thread;
    const Real* source = nullptr;
    if (item.p < args.end && has_column(n) && step.arrives(item.p, column_of(n)))
      source = in_shared ? vector_of(item.p, n) : step.source(item.p, column_of(n));
    store_shared(sources + item.count % 2 * tiling.pass_columns + thread, source);
  }

  RNNFAST_DEVICE Columns columns_of(const Item& item) const {
    const Real** of_item = sources + item.count % 2 * tiling.pass_columns;
    Columns columns;
    RNNFAST_UNROLL
    for (int c = 0; c < column_tiles; ++c)
      if (has_tile(c)) columns.tile[c] = Engine::columns(of_item + c * Engine::tile_columns, lane);
    columns.last = nullptr;
    if (tiling.scouts && has_column(item.pass_begin)) {
      const int rest = tiling.columns - column_of(item.pass_begin);
      columns.last = load_shared(of_item + (rest < tiling.pass_columns ? rest : tiling.pass_columns) - 1);
    }
    columns.may_be_early = in_shared || item.p > args.begin;
    return columns;
  }

  RNNFAST_DEVICE void load(const Columns& columns, int i, Group& group) const {
    const Index terms = step.terms();
    RNNFAST_UNROLL
    for (int j = 0; j < ahead; ++j) {
      if (i + j >= tiling.k_steps) break;
      RNNFAST_UNROLL
      for (int c = 0; c < column_tiles; ++c)
        if (has_tile(c))
          group.inputs[j][c] =
              Engine::template load<From>(columns.tile[c], term(i + j), terms, args.vector, lane);
    }
  }

  // Reads again what had not arrived when it was read.
  RNNFAST_DEVICE void await(const Columns& columns, int i, Group& group) const {
    if (!columns.may_be_early) return;
    const Index terms = step.terms();
    for (;;) {
      bool waits = false;
      RNNFAST_UNROLL
      for (int j = 0; j < ahead; ++j) {
        if (i + j >= tiling.k_steps) break;
        RNNFAST_UNROLL
        for (int c = 0; c < column_tiles; ++c) {
          if (!has_tile(c) || Engine::arrived(group.inputs[j][c])) continue;
          waits = true;
          group.inputs[j][c] =
              Engine::template load<From>(columns.tile[c], term(i + j), terms, args.vector, lane);
        }
      }
      if (!any_lane_waits(waits)) return;
      relax();
    }
  }

  // Until a few numbers of the last column are there, from all over this warp's terms: what is there once is
  // read once, where to read everything in vain would hold up the traffic that it waits for.
  RNNFAST_DEVICE void scout(const Columns& columns) const {
    if (!columns.may_be_early || !columns.last) return;
    constexpr int each = 4;  // of a step over k
    for (;;) {
      bool waits = false;
      for (int n = lane; n < tiling.k_steps * each; n += 32) {
        const Index k = term(n / each) + n % each * (Engine::step / each);
        if (k < step.terms() && !has_arrived(From::read(columns.last + k))) waits = true;
      }
      if (!any_lane_waits(waits)) return;
      relax();
    }
  }

  // The sums of this warp's tiles over its share of the terms, to `partials`. `even` holds the first inputs of
  // the item if there are several passes, and gets those of the next item.
  RNNFAST_DEVICE void multiply(const Resident& resident, const Item& item, Columns& columns, Group& even) const {
    const int first = warp / tiling.k_warps, bundle_warps = block_warps / tiling.k_warps;
    const int stride = partial_stride(tiling, bundle_rows);
    Group odd;
    int at = 0;
    scout(columns);
    for (int bundle = first; bundle < tiling.bundles; bundle += bundle_warps) {
      typename Engine::Sums sums[row_tiles][column_tiles] = {};
      // Multiplies one group's inputs while those of the next are on their way.
      const auto turn = [&](int i, Group& now, Group& next, auto&& weights_of) {
        if (i + ahead < tiling.k_steps) load(columns, i + ahead, next);
        await(columns, i, now);
        RNNFAST_UNROLL
        for (int j = 0; j < ahead; ++j) {
          if (i + j >= tiling.k_steps) break;
          RNNFAST_UNROLL
          for (int r = 0; r < row_tiles; ++r) {
            weights_of(j, r, [&](const uint4(&weights)[Engine::planes]) {
              RNNFAST_UNROLL
              for (int c = 0; c < column_tiles; ++c)
                if (has_tile(c)) Engine::multiply(weights, now.inputs[j][c], sums[r][c]);
            });
          }
        }
      };
      if (one_pass() || bundle != first) load(columns, 0, even);
      int i = 0;
      if (bundle == first) {
        RNNFAST_UNROLL
        for (int next = 0; next < resident_steps; next += ahead) {
          if (next >= tiling.register_steps) break;
          const auto from_registers = [&](int j, int r, auto&& use) { use(resident[(next + j) * row_tiles + r]); };
          if (next / ahead % 2 == 0) {
            turn(next, even, odd, from_registers);
          } else {
            turn(next, odd, even, from_registers);
          }
        }
        i = tiling.register_steps;
      }
      for (; i < tiling.k_steps; i += 2 * ahead) {
        const auto from_memory = [&](int begin) {
          return [&, begin](int j, int r, auto&& use) {
            uint4 weights[Engine::planes];
            fetch(at++, bundle, r, begin + j, weights);
            use(weights);
          };
        };
        turn(i, even, odd, from_memory(i));
        if (i + ahead < tiling.k_steps) turn(i + ahead, odd, even, from_memory(i + ahead));
      }
      State* out = partials_of(item) + Index(k_warp) * tiling.pass_columns * stride + bundle * bundle_rows;
      RNNFAST_UNROLL
      for (int r = 0; r < row_tiles; ++r) {
        RNNFAST_UNROLL
        for (int c = 0; c < column_tiles; ++c)
          if (has_tile(c))
            Engine::store(sums[r][c],
                          out + c * Engine::tile_columns * stride + r * Engine::tile_rows, stride, lane);
      }
    }
    columns = columns_of(after(item));
    if (!one_pass()) load(columns, 0, even);
  }

  RNNFAST_DEVICE State* partials_of(const Item& item) const {
    const int stride = partial_stride(tiling, bundle_rows);
    return partials + Index(item.count % tiling.partial_buffers) * tiling.k_warps * tiling.pass_columns * stride;
  }

  // Vectors in shared memory

  // Empties places of one step, 16 bytes at a time; past the last term there are zeros that stay.
  RNNFAST_DEVICE void clear_vectors(int slot) const {
    constexpr int chunk = 16 / sizeof(Real);
    const Index terms = step.terms();
    for (int n = warp; n < tiling.group_columns; n += block_warps) {
      Real* vector = vector_of(slot, n);
      for (Index k = lane * chunk; k < terms; k += 32 * chunk) {
        if (k + chunk <= terms) {
          publish(InShared{}, reinterpret_cast<uint4*>(vector + k), uint4{~0u, ~0u, ~0u, ~0u});
        } else {
          for (Index rest = k; rest < terms; ++rest) publish_shared(vector + rest, BitsOf<Real>(~BitsOf<Real>(0)));
        }
      }
    }
  }

  RNNFAST_DEVICE void publish_shared(Real* to, BitsOf<Real> bits) const {
    publish(InShared{}, reinterpret_cast<BitsOf<Real>*>(to), bits);
  }

  // All places empty, and what arrives at the first step.
  RNNFAST_DEVICE void prepare_vectors() const {
    const Index terms = step.terms();
    for (int n = warp; n < vector_slots * tiling.group_columns; n += block_warps)
      for (Index k = terms + lane; k < tiling.stride; k += 32) publish_shared(vectors + Index(n) * tiling.stride + k, 0);
    for (int slot = 0; slot < vector_slots; ++slot) clear_vectors(slot);
    sync_block();
    for (int n = warp; n < tiling.group_columns; n += block_warps) {
      if (!has_column(n) || !step.arrives(args.begin, column_of(n))) continue;
      const Real* from = step.source(args.begin, column_of(n));
      for (Index k = lane; k < terms; k += 32) publish_shared(vector_of(args.begin, n) + k, never_absent(from[k]));
    }
  }

  // Cells: those of an item are dealt to the block's threads, consecutive units to consecutive lanes, and always
  // to the same.

  struct Cell {
    int n, unit_in_block, unit, column;
  };

  RNNFAST_DEVICE int units() const { return tiling.bundles * bundle_rows / step.sums(); }
  RNNFAST_DEVICE Cell cell_at(int cell, int pass_begin) const {
    const int n = cell / units(), unit = cell - n * units();
    return {n, unit, block * units() + unit, column_of(pass_begin + n)};
  }
  RNNFAST_DEVICE bool exists(const Cell& cell, int pass_begin) const {
    return cell.n < tiling.pass_columns && cell.unit < args.shape.H && has_column(pass_begin + cell.n);
  }
  RNNFAST_DEVICE bool is_in(const Cell& cell, const Item& item) const {
    return item.p < args.end && exists(cell, item.pass_begin) && step.has_cell(item.p, cell.column);
  }
  RNNFAST_DEVICE State& state_of(const Cell& cell, int pass_begin) const {
    return states[Index(pass_begin + cell.n) * units() + cell.unit_in_block];
  }

  // use(cell, pass_begin) for every cell of this thread, in all passes.
  template <class Use>
  RNNFAST_DEVICE void for_each_cell(Use&& use) const {
    for (int pass_begin = 0; pass_begin < tiling.group_columns; pass_begin += tiling.pass_columns)
      for (int n = thread; n < units() * tiling.pass_columns; n += block_threads) {
        const Cell cell = cell_at(n, pass_begin);
        if (exists(cell, pass_begin)) use(cell, pass_begin);
      }
  }

  // The sums of a unit, over all k warps.
  RNNFAST_DEVICE void add_partials(const Cell& cell, const Item& item, State (&sums)[4]) const {
    const int stride = partial_stride(tiling, bundle_rows);
    const State* from = partials_of(item) + cell.n * stride + cell.unit_in_block * step.sums();
    const Index next = Index(tiling.pass_columns) * stride;
    if (step.sums() == 4) {
      struct alignas(16) Gates {
        State of[4];
      };
      for (int k = 0; k < tiling.k_warps; ++k, from += next) {
        const Gates part = load_shared(reinterpret_cast<const Gates*>(from));
        RNNFAST_UNROLL
        for (int gate = 0; gate < 4; ++gate) sums[gate] += part.of[gate];
      }
    } else {
      for (int k = 0; k < tiling.k_warps; ++k, from += next) sums[0] += load_shared(from);
    }
  }

  RNNFAST_DEVICE void finish(const Cell& cell, const Item& item, const typename Step::Inputs& inputs) const {
    State sums[4] = {};
    add_partials(cell, item, sums);
    const bool has_state = args.shape.cell == rnnfast::Cell::lstm;
    State state = has_state ? load_shared(&state_of(cell, item.pass_begin)) : State(0);
    const bool hands_on = in_shared && item.p + 1 < args.end;
    Real* mine = in_shared ? vector_of(item.p + 1, item.pass_begin + cell.n) : nullptr;
    Real* target = step.target(item.p, cell.column);
    step.finish(item.p, cell.column, cell.unit, inputs, sums, state, [&](Index k, Real value) {
      const BitsOf<Real> bits = never_absent(value);
      if (hands_on) {
        if (args.blocks == 1) {
          publish_shared(mine + k, bits);
        } else {
          for (int rank = 0; rank < args.blocks; ++rank)
            publish_to_peer(rank, reinterpret_cast<BitsOf<Real>*>(mine + k), bits);
        }
      }
      publish_number(target + k, bits);
    });
    if (has_state) store_shared(&state_of(cell, item.pass_begin), state);
  }

  using CellInputs = typename Step::Inputs[Step::cells_ahead];

  // The inputs of this thread's first cells of an item.
  RNNFAST_DEVICE void load_cells(const Item& item, CellInputs& inputs) const {
    RNNFAST_UNROLL
    for (int n = 0; n < Step::cells_ahead; ++n) {
      const Cell cell = cell_at(thread + n * block_threads, item.pass_begin);
      if (is_in(cell, item)) inputs[n] = step.load(item.p, cell.column, cell.unit);
    }
  }

  RNNFAST_DEVICE void finish_cells(const Item& item, const CellInputs& inputs) const {
    RNNFAST_UNROLL
    for (int n = 0; n < Step::cells_ahead; ++n) {
      const Cell cell = cell_at(thread + n * block_threads, item.pass_begin);
      if (is_in(cell, item)) finish(cell, item, inputs[n]);
    }
    RNNFAST_ROLL
    for (int n = thread + Step::cells_ahead * block_threads; n < units() * tiling.pass_columns; n += block_threads) {
      const Cell cell = cell_at(n, item.pass_begin);
      if (is_in(cell, item)) finish(cell, item, step.load(item.p, cell.column, cell.unit));
    }
  }

  RNNFAST_DEVICE void sync_group() const {
    if (in_shared && args.blocks > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
  }

  RNNFAST_DEVICE void run() const {
    const bool has_state = args.shape.cell == rnnfast::Cell::lstm;
    Resident resident;
    settle(resident);
    if (has_state)
      for_each_cell([&](const Cell& cell, int pass_begin) {
        store_shared(&state_of(cell, pass_begin), step.state_before(args.begin, cell.column, cell.unit));
      });
    if (in_shared) prepare_vectors();
    Item item{args.begin, 0, 0};
    find_sources(item);
    find_sources(after(item));
    sync_group();

    Columns columns = columns_of(item);
    sync_block();  // before the sources of another item take their place
    Group even;
    if (!one_pass()) load(columns, 0, even);
    typename Step::Inputs inputs[Step::cells_ahead] = {};
    load_cells(item, inputs);
    while (item.p < args.end) {
      multiply(resident, item, columns, even);
      const Item next = after(item);
      find_sources(after(next));
      // Those of the step before have been read, and no peer writes the step after next before it has what
      // follows the barrier.
      if (in_shared && item.pass_begin == 0) clear_vectors(item.p + vector_slots - 1);
      sync_block();
      finish_cells(item, inputs);
      load_cells(next, inputs);
      if (tiling.partial_buffers == 1) sync_block();
      item = next;
    }

    if (has_state)
      for_each_cell([&](const Cell& cell, int pass_begin) {
        step.keep_state(cell.column, cell.unit, load_shared(&state_of(cell, pass_begin)));
      });
    if (in_shared) sync_group();  // no block's memory goes away while a peer writes to it
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
