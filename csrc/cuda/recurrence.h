// The recurrence: one launch for all steps (methods local, cluster and grid of plan.h) or for one.
//
// A step is bound by latency: v on its way from the blocks that computed it (exchange.h), the products, one
// pass through shared memory where the warps' partial sums meet, the cell, and the stores that the next step
// waits for. So there is one barrier in a step, for the partial sums; each warp waits for its own part of v and
// no more; and whatever no other block has a part in is there before it is wanted: c stays in shared memory,
// the cells' inputs are loaded a step ahead. The warps of a block split the terms, so a block reads each
// number of v once, and every warp finds its part of the weights where it left it.
#pragma once

#include "backward.h"
#include "engine.h"
#include "plan.h"

namespace rnnfast::cuda {

template <class Step>
struct Arguments {
  using Real = typename Step::Real;
  RecurrenceShape shape;
  Tiling tiling;
  SharedLayout shared;
  typename Step::Layer layers[2];  // one for each direction
  typename Step::Carry carries[2];
  uint4* weights[2];   // packed
  Real* exchange[2];   // (rows, exchange_stride): what goes round in global memory, null where it doesn't
  Real* initial[2];    // (initial_rows, exchange_stride): what comes in at the first step; then tiling.zeros zeros
  int initial_rows;
  int begin, end;      // steps of this launch
  int blocks;          // of a group
  bool may_be_early;   // who reads a vector has to wait until it is there
  bool apart;          // the exchange is no output, which is written besides
};

// Where the packed tile (tile, k_step) begins.
template <class Engine>
RNNFAST_DEVICE Index packed_at(const Tiling& tiling, Index tile, int k_step) {
  return (tile * tiling.k_steps * block_warps + k_step) * Engine::planes * 32;
}

template <class Step>
RNNFAST_ANYWHERE Index initial_numbers(const Arguments<Step>& args) {
  return args.initial_rows * Index(args.tiling.exchange_stride) + args.tiling.zeros;
}

// Weights in the order of the kernel, and what comes in at the first step, in rows like those of the exchange.
template <class Engine, class Step>
RNNFAST_KERNEL(block_threads)
pack(RNNFAST_ARGUMENT Arguments<Step> args, RNNFAST_ARGUMENT Index count) {
  using Real = typename Engine::Real;
  const int direction = block_index().z;
  const Step step{args.shape, args.layers[direction], args.carries[direction]};
  const Index at = Index(block_index().x) * block_threads + thread_index();
  const Index terms = step.terms();
  if (args.initial[direction] && at < initial_numbers(args)) {
    const Index row = at / args.tiling.exchange_stride, k = at % args.tiling.exchange_stride;
    const Real number = row < args.initial_rows && k < terms ? step.initial(row, k) : Real{};
    args.initial[direction][at] = number_of_bits<Real>(never_absent(number));
  }
  if (at >= count) return;
  const int lane = int(at % 32), plane = int(at / 32 % Engine::planes);
  const int k_steps = args.tiling.k_steps * block_warps;
  const Index tile = at / (32 * Engine::planes);
  const Index row = tile / k_steps * Engine::tile_rows, k = tile % k_steps * Engine::step;
  const Index rows = args.shape.H * step.sums;
  args.weights[direction][at] = Engine::pack(plane, lane, [&](int r, int n) {
    return row + r < rows && k + n < terms ? step.weight(row + r, k + n) : Real{};
  });
}

// Adds up the gradients of the initial state, window after window.
template <class Real, int gates>
RNNFAST_KERNEL(block_threads)
add_starts(RNNFAST_ARGUMENT Arguments<Backward<Real, gates>> args) {
  using State = StateOf<Real>;
  const int direction = block_index().z;
  const RecurrenceBackward<Real, State>& layer = args.layers[direction];
  const typename Backward<Real, gates>::Carry& carry = args.carries[direction];
  const Truncation truncation{args.shape.T, args.shape.k1, args.shape.k2, layer.reverse};
  const Index count = args.shape.B * args.shape.H, windows = truncation.windows_to_start();
  const Index at = Index(block_index().x) * block_threads + thread_index();
  if (at >= count) return;
  State dh(0), dc(0);
  for (Index j = 0; j < windows; ++j) {
    dh += carry.starts[j * count + at];
    if (gates == 4) dc += carry.dc[j * count + at];
  }
  layer.dh0[at] = narrow<Real>(dh);
  if (gates == 4) layer.dc0[at] = dc;
}

template <class Engine, class From, class Step>
struct Recurrence {
  using Real = typename Engine::Real;
  using State = typename Engine::State;
  using Bits = BitsOf<Real>;
  static constexpr bool in_shared = std::is_same<From, FromShared>::value;
  static constexpr int row_tiles = Engine::row_tiles;
  static constexpr int bundle_rows = row_tiles * Engine::tile_rows;
  static constexpr int resident_steps = Engine::resident_tiles / row_tiles;

  const Arguments<Step>& args;
  const Tiling& tiling;
  const Step step;
  static constexpr int each = block_warps * Engine::step;  // terms from one step of a warp to its next

  const int direction, group, block, thread, lane, warp;
  const int partial_pitch;               // numbers from one column of partial sums to the next
  const int units, cell_columns;         // of the block; columns whose cells it computes at once
  const int unit_in_block, own_unit;     // of this thread
  const bool has_unit;
  const int own_column;                  // the first of those whose cells this thread computes
  const int columns_here;                // of the group
  const int valid_steps;                 // over k, in which this lane has numbers

  typename Step::Column* columns;  // (group_columns), unless they are simple
  State* partials;                 // (partial_buffers, warps, pass_columns, partial_pitch)
  State* states;                   // (group_columns, units): LSTMs only
  uint4* shared_weights;           // (warps, shared_tiles, planes, lanes)
  Real* vectors;                   // (vector_slots, group_columns, stride), where in_shared; then tiling.zeros zeros
  const Real* zero_vector;

  template <class T>
  RNNFAST_DEVICE static T* in_memory(int at) {
    return reinterpret_cast<T*>(shared_memory() + at);
  }

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
        partial_pitch(partial_stride(tiling, bundle_rows)),
        units(tiling.bundles * bundle_rows / Step::sums),
        cell_columns(block_threads / units),
        unit_in_block(thread % units),
        own_unit(block * units + unit_in_block),
        has_unit(own_unit < int(args.shape.H)),
        own_column(thread / units < cell_columns ? thread / units : tiling.pass_columns),  // none
        columns_here(column_count()),
        valid_steps(steps_of_lane()),
        columns(in_memory<typename Step::Column>(args.shared.columns)),
        partials(in_memory<State>(args.shared.partials)),
        states(in_memory<State>(args.shared.states)),
        shared_weights(in_memory<uint4>(args.shared.weights)),
        vectors(in_memory<Real>(args.shared.vectors)),
        zero_vector(zeros()) {}

  RNNFAST_DEVICE int column_count() const {
    const int rest = tiling.columns - group * tiling.group_columns;
    return rest < tiling.group_columns ? rest : tiling.group_columns;
  }
  RNNFAST_DEVICE int steps_of_lane() const {
    const int rest = padded_terms() - warp * Engine::step - Engine::first(lane);
    return rest > 0 ? (rest + each - 1) / each : 0;
  }
  // The numbers of a vector: past the last term, up to whole 16 bytes, there are zeros.
  RNNFAST_DEVICE int padded_terms() const { return tiling.exchange_stride; }

  // What is multiplied between two barriers: `pass_columns` of the group's columns in one step.
  struct Item {
    int p, pass_begin;
    bool odd;  // is an odd number of items after the first one
  };

  RNNFAST_DEVICE Item after(const Item& item) const {
    const int next = item.pass_begin + tiling.pass_columns;
    if (next < columns_here) return {item.p, next, !item.odd};
    return {item.p + 1, 0, !item.odd};
  }
  RNNFAST_DEVICE bool one_pass() const { return tiling.pass_columns >= tiling.group_columns; }

  // Weights

  // A tile, wherever it lies: `at` counts this warp's tiles that are not in registers.
  RNNFAST_DEVICE void fetch(int at, int bundle, int row_tile, int i, uint4 (&weights)[Engine::planes]) const {
    if (at < tiling.shared_tiles) {
      const uint4* from = shared_weights + ((warp * tiling.shared_tiles + at) * (Engine::planes * 32) + lane);
      RNNFAST_UNROLL
      for (int plane = 0; plane < Engine::planes; ++plane) weights[plane] = load_shared(from + plane * 32);
    } else {
      fetch_packed(bundle, row_tile, i, weights);
    }
  }

  RNNFAST_DEVICE void fetch_packed(int bundle, int row_tile, int i, uint4 (&weights)[Engine::planes]) const {
    const Index tile = (Index(block) * tiling.bundles + bundle) * row_tiles + row_tile;
    const uint4* from =
        args.weights[direction] + packed_at<Engine>(tiling, tile, i * block_warps + warp) + lane;
    RNNFAST_UNROLL
    for (int plane = 0; plane < Engine::planes; ++plane) weights[plane] = load_global(from + plane * 32);
  }

  using Resident = uint4[Engine::resident_tiles][Engine::planes];

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
          uint4* to = shared_weights + ((warp * tiling.shared_tiles + at) * (Engine::planes * 32) + lane);
          RNNFAST_UNROLL
          for (int plane = 0; plane < Engine::planes; ++plane)
            store_shared(to + plane * 32, weights[plane]);
        }
      }
    }
  }

  // Vectors

  using Inputs = typename Engine::Inputs;

  RNNFAST_DEVICE Real* shared_vector(int p, int n) const {
    return vectors + (p % vector_slots * tiling.group_columns + n) * tiling.stride;
  }
  // A vector of zeros.
  RNNFAST_DEVICE const Real* zeros() const {
    if (in_shared) return vectors + vector_slots * tiling.group_columns * tiling.stride;
    return args.initial[direction] + Index(args.initial_rows) * tiling.exchange_stride;
  }

  RNNFAST_DEVICE int column_of(int n) const { return group * tiling.group_columns + n; }
  RNNFAST_DEVICE typename Step::Column column_at(int n) const {
    if constexpr (Step::columns_are_simple) {
      return step.column(column_of(n));
    } else {
      return load_shared(columns + n);
    }
  }

  // In global memory overlapping windows have rows of their own, for two steps in turn.
  RNNFAST_DEVICE Index exchange_row(int p, int n, int row) const {
    if (!Step::columns_are_simple && args.shape.k2 > args.shape.k1)
      return Index(p & 1) * tiling.columns + column_of(n);
    return row;
  }

  // The vector that the group's column n gets at step p. Whose sums nobody wants gets any.
  RNNFAST_DEVICE const Real* source(int p, int n) const {
    if (p >= args.end) return zeros();
    n = n < columns_here ? n : columns_here - 1;
    const typename Step::Column column = column_at(n);
    if (!step.arrives(p, column)) return zeros();
    if (in_shared) return shared_vector(p, n);
    if (step.is_initial(p)) return args.initial[direction] + Index(column_of(n)) * tiling.exchange_stride;
    return args.exchange[direction] + exchange_row(p - 1, n, step.source_row(p, column)) * tiling.exchange_stride;
  }

  // The products of one item with so many tiles of columns, and what they read.
  template <int tiles>
  struct Products {
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
          group.inputs[j][c] =
              Engine::template load<From>(sources[c], i * each, j * each, i + j < of.valid_steps, of.zero_vector);
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
    RNNFAST_DEVICE void run(const Resident& resident, const Item& item, const Item& next) {
      const Tiling& tiling = of.tiling;
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
            of.fetch(at++, bundle, r, i + j, weights);
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
                use(resident[(first + j) * row_tiles + r < Engine::resident_tiles ? (first + j) * row_tiles + r : 0]);
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
        if (bundle + 1 < tiling.bundles) begin();
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

  RNNFAST_DEVICE State* partials_of(const Item& item) const {
    const bool second = item.odd && tiling.partial_buffers == 2;
    return partials + (second ? block_warps * tiling.pass_columns * partial_pitch : 0);
  }

  // Vectors in shared memory

  // Empties places of one step, 16 bytes at a time; past the last term there are zeros that stay.
  RNNFAST_DEVICE void clear_vectors(int p) const {
    constexpr int chunk = 16 / sizeof(Real);
    const int terms = step.terms();
    for (int n = warp; n < columns_here; n += block_warps) {
      Real* vector = shared_vector(p, n);
      for (int k = lane * chunk; k < terms; k += 32 * chunk) {
        if (k + chunk <= terms) {
          publish(InShared{}, reinterpret_cast<uint4*>(vector + k), uint4{~0u, ~0u, ~0u, ~0u});
        } else {
          for (int rest = k; rest < terms; ++rest) publish_shared(vector + rest, Bits(~Bits(0)));
        }
      }
    }
  }

  RNNFAST_DEVICE void publish_shared(Real* to, Bits bits) const {
    publish(InShared{}, reinterpret_cast<Bits*>(to), bits);
  }

  // All places empty, and what comes in at the first step.
  RNNFAST_DEVICE void prepare_vectors() const {
    const int terms = step.terms();
    for (int n = warp; n < vector_slots * tiling.group_columns; n += block_warps)
      for (int k = terms + lane; k < padded_terms(); k += 32) publish_shared(vectors + n * tiling.stride + k, 0);
    for (int k = thread; k < tiling.zeros; k += block_threads)
      publish_shared(vectors + vector_slots * tiling.group_columns * tiling.stride + k, 0);
    for (int slot = 0; slot < vector_slots; ++slot) clear_vectors(slot);
    sync_block();
    if (!step.is_initial(args.begin)) return;
    for (int n = warp; n < columns_here; n += block_warps)
      for (int k = lane; k < terms; k += 32)
        publish_shared(shared_vector(args.begin, n) + k, never_absent(step.initial(column_of(n), k)));
  }

  // Cells. A thread has one unit, in every `cell_columns`th column of an item.

  RNNFAST_DEVICE bool has_cell(const Item& item, int n) const {
    return has_unit && n < tiling.pass_columns && item.pass_begin + n < columns_here && item.p < args.end &&
           step.has_cell(item.p, column_at(item.pass_begin + n));
  }

  // use(unit, column, state) for all of this thread's cells.
  template <class Use>
  RNNFAST_DEVICE void for_each_state(Use&& use) const {
    if (!Step::has_state || !has_unit) return;
    for (int begin = 0; begin < columns_here; begin += tiling.pass_columns)
      for (int n = own_column; n < tiling.pass_columns && begin + n < columns_here; n += cell_columns)
        use(own_unit, column_of(begin + n), states + (begin + n) * units + unit_in_block);
  }

  // The sums of a unit, over all warps.
  RNNFAST_DEVICE void add_partials(const Item& item, int n, State (&sums)[Step::sums]) const {
    struct alignas(Step::sums == 4 ? 16 : sizeof(State)) Part {
      State of[Step::sums];
    };
    const State* from = partials_of(item) + n * partial_pitch + unit_in_block * Step::sums;
    const int next = tiling.pass_columns * partial_pitch;
    Part parts[block_warps];
    RNNFAST_UNROLL
    for (int k = 0; k < block_warps; ++k, from += next) parts[k] = load_shared(reinterpret_cast<const Part*>(from));
    RNNFAST_UNROLL
    for (int k = 0; k < block_warps; ++k) {
      RNNFAST_UNROLL
      for (int sum = 0; sum < Step::sums; ++sum) sums[sum] += parts[k].of[sum];
    }
  }

  RNNFAST_DEVICE void finish(const Item& item, int n, const typename Step::Inputs& inputs) const {
    State sums[Step::sums] = {};
    add_partials(item, n, sums);
    const int at = item.pass_begin + n;
    State* kept = states + at * units + unit_in_block;
    State state = Step::has_state ? load_shared(kept) : State(0);
    Real* out = nullptr;
    if constexpr (in_shared) {
      out = shared_vector(item.p + 1, at);
    } else {
      out = args.exchange[direction] + exchange_row(item.p, at, inputs.row) * tiling.exchange_stride;
    }
    const bool last = item.p + 1 >= args.end;
    const bool keeps = in_shared || args.apart;
    step.finish(item.p, column_of(at), own_unit, inputs, sums, state, keeps, [&](int k, Real value) {
      const Bits bits = never_absent(value);
      if constexpr (!in_shared) {
        publish(InGlobal{}, reinterpret_cast<Bits*>(out + k), bits);
      } else if (!last) {
        if (args.blocks == 1) {
          publish_shared(out + k, bits);
        } else {
          for (int rank = 0; rank < args.blocks; ++rank)
            publish_to_peer(rank, reinterpret_cast<Bits*>(out + k), bits);
        }
      }
    });
    if (Step::has_state) store_shared(kept, state);
  }

  // Whether there is such a cell; then also its inputs.
  RNNFAST_DEVICE bool load_cell(const Item& item, int n, typename Step::Inputs& inputs) const {
    if (!has_cell(item, n)) return false;
    inputs = step.load(item.p, column_at(item.pass_begin + n), own_unit);
    return true;
  }

  // This thread's cells of an item. `inputs` are those of the first one, and then of the next item's first.
  RNNFAST_DEVICE void finish_cells(const Item& item, const Item& next, bool& exists,
                                   typename Step::Inputs& inputs) const {
    RNNFAST_ROLL
    for (int n = own_column; n < tiling.pass_columns; n += cell_columns) {
      if (exists) finish(item, n, inputs);
      const bool more = n + cell_columns < tiling.pass_columns;
      const Item of{more ? item.p : next.p, more ? item.pass_begin : next.pass_begin, false};
      exists = load_cell(of, more ? n + cell_columns : own_column, inputs);
    }
  }

  RNNFAST_DEVICE void sync_group() const {
    if (in_shared && args.blocks > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
  }

  template <int tiles>
  RNNFAST_DEVICE void run_steps(const Resident& resident) const {
    Item item{args.begin, 0, false};
    Products<tiles> products(*this);
    products.find_sources(item);
    if (!one_pass()) products.begin();
    typename Step::Inputs inputs{};
    bool exists = load_cell(item, own_column, inputs);
    while (item.p < args.end) {
      const Item next = after(item);
      products.run(resident, item, next);
      // The step before has been read, and no peer writes the step after next before it has what follows the
      // barrier.
      if (in_shared && item.pass_begin == 0) clear_vectors(item.p + vector_slots - 1);
      sync_block();
      finish_cells(item, next, exists, inputs);
      if (tiling.partial_buffers == 1) sync_block();
      item = next;
      if (one_pass()) products.find_sources(item);
    }
  }

  RNNFAST_DEVICE void run() const {
    Resident resident;
    settle(resident);
    if (!Step::columns_are_simple)
      for (int n = thread; n < columns_here; n += block_threads) store_shared(columns + n, step.column(column_of(n)));
    for_each_state([&](int unit, int column, State* state) {
      store_shared(state, step.state_before(args.begin, column, unit));
    });
    if (in_shared) prepare_vectors();
    sync_group();
    if (Engine::column_tiles == 1 || tiling.pass_columns <= Engine::tile_columns) {
      run_steps<1>(resident);
    } else {
      run_steps<Engine::column_tiles>(resident);
    }
    for_each_state([&](int unit, int column, State* state) {
      step.keep_state(column, unit, load_shared(state));
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
