// The recurrence: one launch for all steps (methods local, cluster and grid of plan.h) or for one.
//
// A step is bound by latency: v on its way from the blocks that computed it (exchange.h), the products, one
// pass through shared memory where the warps' partial sums meet, the cell, and the stores that the next step
// waits for. So there is one barrier in a step, for the partial sums; each warp waits for its own part of v and
// no more; and whatever no other block has a part in is there before it is wanted: c stays in shared memory,
// the cells' inputs are loaded a step ahead. The warps of a block split the terms, so a block reads each
// number of v once, and every warp finds its part of the weights where it left it.
#pragma once

#include "products.h"

namespace rnnfast::cuda {

template <class Engine_, class From_, class Step>
struct Recurrence {
  using Engine = Engine_;
  using From = From_;
  using Real = typename Engine::Real;
  using State = typename Engine::State;
  using Bits = BitsOf<Real>;
  static constexpr bool in_shared = std::is_same<From, FromShared>::value;
  static constexpr int bundle_rows = Engine::row_tiles * Engine::tile_rows;
  static constexpr int each = block_warps * Engine::step;  // terms from one step of a warp to its next

  const Arguments<Step>& args;
  const Tiling& tiling;
  const Step step;
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
  const Weights<Engine> weights;
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
        weights{tiling, args.weights[direction], in_memory<uint4>(args.shared.weights), block, warp, lane},
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

  // Vectors

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
    if constexpr (Step::has_state) {
      if (!has_unit) return;
      for (int begin = 0; begin < columns_here; begin += tiling.pass_columns)
        for (int n = own_column; n < tiling.pass_columns && begin + n < columns_here; n += cell_columns)
          use(own_unit, column_of(begin + n), states + (begin + n) * units + unit_in_block);
    }
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
    const typename Step::Column column = column_at(at);
    const typename Step::Outputs outputs = step.template compute<false>(item.p, column, inputs, sums, state);
    if (step.sends(item.p, column)) hand_on(item, at, column, outputs);
    step.template store<false>(item.p, column, column_of(at), own_unit, step.place(item.p, column, own_unit), outputs,
                               state, args.apart);
    if (item.p + 1 == args.end) step.finish(column, own_unit, outputs);
    if (Step::has_state) store_shared(kept, state);
  }

  // A cell's numbers of the next step's vector, to whoever waits for them.
  RNNFAST_DEVICE void hand_on(const Item& item, int at, const typename Step::Column& column,
                              const typename Step::Outputs& outputs) const {
    Real* out = nullptr;
    if constexpr (in_shared) {
      if (item.p + 1 >= args.end) return;
      out = shared_vector(item.p + 1, at);
    } else {
      out = args.exchange[direction] + exchange_row(item.p, at, step.row(item.p, column)) * tiling.exchange_stride;
    }
    step.for_each_sent(own_unit, outputs, [&](int k, Real value) {
      const Bits bits = never_absent(value);
      if constexpr (!in_shared) {
        publish(InGlobal{}, reinterpret_cast<Bits*>(out + k), bits);
      } else if (args.blocks == 1) {
        publish_shared(out + k, bits);
      } else {
        for (int rank = 0; rank < args.blocks; ++rank)
          publish_to_peer(rank, reinterpret_cast<Bits*>(out + k), bits);
      }
    });
  }

  // Whether there is such a cell; then also its inputs.
  RNNFAST_DEVICE bool load_cell(const Item& item, int n, typename Step::Inputs& inputs) const {
    if (!has_cell(item, n)) return false;
    const typename Step::Column column = column_at(item.pass_begin + n);
    inputs = step.template load<false>(item.p, column, own_unit, step.place(item.p, column, own_unit));
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
  RNNFAST_DEVICE void run_steps(const typename Weights<Engine>::Resident& resident) const {
    Item item{args.begin, 0, false};
    Products<Recurrence, tiles> products(*this);
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

  template <int tiles>
  RNNFAST_DEVICE void run() const {
    typename Weights<Engine>::Resident resident;
    weights.settle(resident);
    if (!Step::columns_are_simple)
      for (int n = thread; n < columns_here; n += block_threads) store_shared(columns + n, step.column(column_of(n)));
    for_each_state([&](int unit, int column, State* state) {
      store_shared(state, step.state_before(args.begin, column, unit));
    });
    if (in_shared) prepare_vectors();
    sync_group();
    run_steps<tiles>(resident);
    for_each_state([&](int unit, int column, State* state) {
      step.keep_state(column, unit, load_shared(state));
    });
    if (in_shared) sync_group();  // no block's memory goes away while a peer writes to it
  }
};

// tiles: of columns, that an item has.
template <class Engine, class From, class Step, int tiles>
RNNFAST_KERNEL(block_threads)
recur(RNNFAST_ARGUMENT Arguments<Step> args) {
  if constexpr (Engine::is_built) {
    const Recurrence<Engine, From, Step> recurrence(args);
    recurrence.template run<tiles>();
  } else {
    fail();
  }
}

}  // namespace rnnfast::cuda
