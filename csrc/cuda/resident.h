// The method resident: as grid, of blocks whose registers hold all weights and which multiply all of a group's columns
// at once. What a step does is known when this is compiled, but for the number of terms, so that few instructions stand
// between a vector's arrival and the numbers that it becomes; see recurrence.h for the rest.
//
// For an LSTM forward a tile has two gates of eight units and its neighbour the other two, so that a lane has a unit's
// four sums side by side, and they go through shared memory 16 bytes at a time.
#pragma once

#include "weights.h"

namespace rnnfast::cuda {

// What a block multiplies: so many tiles of rows, steps over k of a warp, at most, and tiles of columns.
template <int rows_, int steps_, int columns_>
struct Shape {
  static constexpr int rows = rows_, steps = steps_, columns = columns_;
};

template <class Step, class Shape>
struct Resident {
  using Real = typename Step::Real;
  using State = float;
  using Tile = Mma<Real, 1>;
  using Bits = BitsOf<Real>;
  static constexpr int sums = Step::sums, columns = Shape::columns * Tile::tile_columns;
  static constexpr int units = Shape::rows * Tile::tile_rows / sums;
  static constexpr int pitch = units * sums + 4;  // from one column of partial sums to the next, spread over the banks
  static constexpr int each = block_warps * Tile::step;
  static constexpr int cell_columns = block_threads / units;  // of which the block's threads have a cell each
  static constexpr int cells = columns > cell_columns ? columns / cell_columns : 1;  // of a thread

  const Arguments<Step>& args;
  const Step step;
  const int direction, group, block, thread, lane, warp;
  const int own_unit, own_column;
  const int valid_steps;
  State* const partials;  // (2, warps, columns, pitch)
  const Real* const zeros;

  RNNFAST_DEVICE explicit Resident(const Arguments<Step>& arguments, const typename Step::Layer& layer)
      : args(arguments),
        step{args.shape, layer, args.carries[block_index().z]},
        direction(block_index().z),
        group(block_index().y),
        block(block_index().x),
        thread(thread_index()),
        lane(thread % 32),
        warp(thread / 32),
        own_unit(block * units + thread % units),
        own_column(thread / units),
        valid_steps(steps_of_lane()),
        partials(reinterpret_cast<State*>(shared_memory() + args.shared.partials)),
        zeros(args.initial[direction] + Index(args.initial_rows) * args.tiling.exchange_stride) {}

  RNNFAST_DEVICE int steps_of_lane() const {
    const int rest = args.tiling.exchange_stride - warp * Tile::step - Tile::first(lane);
    return rest > 0 ? (rest + each - 1) / each : 0;
  }

  // Whose column does not exist gets the group's last one, and nobody wants its sums.
  RNNFAST_DEVICE int column_of(int n) const {
    const int index = group * columns + n;
    return index < args.tiling.columns ? index : args.tiling.columns - 1;
  }
  RNNFAST_DEVICE bool has_column(int n) const { return n < columns && group * columns + n < args.tiling.columns; }

  // Where this lane's numbers of the vector lie that a column gets at step p.
  RNNFAST_DEVICE const Real* source(int p, int index, const typename Step::Column& column) const {
    const Real* from = zeros;
    if (p < args.end && step.arrives(p, column)) {
      from = step.is_initial(p)
                 ? args.initial[direction] + Index(index) * args.tiling.exchange_stride
                 : args.exchange[direction] + Index(step.source_row(p, column)) * args.tiling.exchange_stride;
    }
    return from + warp * Tile::step + Tile::first(lane);
  }

  using Inputs = uint4[Shape::columns][Shape::steps];

  template <class Use>
  RNNFAST_DEVICE void for_each_input(Use&& use) const {
    RNNFAST_UNROLL
    for (int i = 0; i < Shape::steps; ++i) {
      if (i >= args.tiling.k_steps) break;
      RNNFAST_UNROLL
      for (int c = 0; c < Shape::columns; ++c) use(c, i);
    }
  }
  RNNFAST_DEVICE uint4 read_one(const Real* from, int i) const {
    return FromGlobal::read(reinterpret_cast<const uint4*>(i < valid_steps ? from + i * each : zeros));
  }

  // Reads again what is missing, and no more: all blocks ask L2 for the same numbers.
  RNNFAST_DEVICE void await(const Real* const (&from)[Shape::columns], Inputs& inputs) const {
    for (;;) {
      Arrivals<Real> arrivals;
      for_each_input([&](int c, int i) { arrivals.add(inputs[c][i]); });
      if (!any_lane_waits(arrivals.are_missing())) return;
      relax();
      for_each_input([&](int c, int i) {
        Arrivals<Real> own;
        own.add(inputs[c][i]);
        if (own.are_missing()) inputs[c][i] = read_one(from[c], i);
      });
    }
  }

  using Weights = uint4[Shape::rows][Shape::steps][Tile::planes];

  RNNFAST_DEVICE void load(Weights& weights) const {
    RNNFAST_UNROLL
    for (int r = 0; r < Shape::rows; ++r) {
      RNNFAST_UNROLL
      for (int i = 0; i < Shape::steps; ++i) {
        if (i >= args.tiling.k_steps) break;
        const uint4* from = args.weights[direction] + lane +
                            packed_at<Tile>(args.tiling, Index(block) * Shape::rows + r, i * block_warps + warp);
        RNNFAST_UNROLL
        for (int plane = 0; plane < Tile::planes; ++plane) weights[r][i][plane] = load_global(from + plane * 32);
      }
    }
  }

  RNNFAST_DEVICE State* partials_of(int p, int of_warp) const {
    return partials + ((p % 2 * block_warps + of_warp) * columns) * pitch;
  }

  // This warp's share of all sums, to `partials`.
  RNNFAST_DEVICE void multiply(const Weights& weights, const Inputs& inputs, State* out) const {
    typename Tile::Sums total[Shape::rows][Shape::columns] = {};
    RNNFAST_UNROLL
    for (int i = 0; i < Shape::steps; ++i) {
      if (i >= args.tiling.k_steps) break;
      RNNFAST_UNROLL
      for (int r = 0; r < Shape::rows; ++r) {
        RNNFAST_UNROLL
        for (int c = 0; c < Shape::columns; ++c) Tile::multiply(weights[r][i], inputs[c][i], total[r][c]);
      }
    }
    RNNFAST_UNROLL
    for (int c = 0; c < Shape::columns; ++c) {
      RNNFAST_UNROLL
      for (int n = 0; n < 2; ++n) {
        State* to = out + (c * Tile::tile_columns + lane % 4 * 2 + n) * pitch + lane / 4 * sums;
        RNNFAST_UNROLL
        for (int r = 0; r < Shape::rows; r += sums == 4 ? 2 : 1) {
          if constexpr (sums == 4) {
            const auto &first = total[r][c], &second = total[r + 1][c];
            store_shared(reinterpret_cast<Four*>(to + r / 2 * 32),
                         Four{{first.of(n), first.of(2 + n), second.of(n), second.of(2 + n)}});
          } else {
            store_shared(to + r * 16, total[r][c].of(n));
            store_shared(to + r * 16 + 8, total[r][c].of(2 + n));
          }
        }
      }
    }
  }

  struct alignas(16) Four {
    State of[4];
  };
  struct alignas(sums == 4 ? 16 : 4) Part {
    State of[sums];
  };

  RNNFAST_DEVICE void add_partials(int p, int n, State (&total)[sums]) const {
    const State* from = partials_of(p, 0) + n * pitch + thread % units * sums;
    Part parts[block_warps];
    RNNFAST_UNROLL
    for (int k = 0; k < block_warps; ++k)
      parts[k] = load_shared(reinterpret_cast<const Part*>(from + k * (columns * pitch)));
    RNNFAST_UNROLL
    for (int sum = 0; sum < sums; ++sum) total[sum] = 0;
    RNNFAST_UNROLL
    for (int k = 0; k < block_warps; ++k) {
      RNNFAST_UNROLL
      for (int sum = 0; sum < sums; ++sum) total[sum] += parts[k].of[sum];
    }
  }

  RNNFAST_DEVICE void run() const {
    Weights weights;
    load(weights);
    int source_index[Shape::columns];
    typename Step::Column source_column[Shape::columns];
    const Real* from[Shape::columns];
    RNNFAST_UNROLL
    for (int c = 0; c < Shape::columns; ++c) {
      source_index[c] = column_of(c * Tile::tile_columns + lane / 4);
      source_column[c] = step.column(source_index[c]);
      from[c] = source(args.begin, source_index[c], source_column[c]);
    }
    bool exists[cells];
    typename Step::Column column[cells];
    typename Step::Inputs ahead[cells] = {};
    State state[cells] = {};
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i) {
      const int n = own_column + i * cell_columns;
      exists[i] = has_column(n) && own_unit < int(args.shape.H);
      column[i] = step.column(column_of(n));
      if (!exists[i]) continue;
      if (Step::has_state) state[i] = step.state_before(args.begin, column_of(n), own_unit);
      if (step.has_cell(args.begin, column[i])) ahead[i] = step.load(args.begin, column[i], own_unit);
    }

    RNNFAST_ROLL
    for (int p = args.begin; p < args.end; ++p) {
      Inputs inputs = {};
      for_each_input([&](int c, int i) { inputs[c][i] = read_one(from[c], i); });
      // While these are on their way.
      typename Step::Inputs now[cells];
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i) {
        now[i] = ahead[i];
        if (exists[i] && p + 1 < args.end && step.has_cell(p + 1, column[i]))
          ahead[i] = step.load(p + 1, column[i], own_unit);
      }
      const Real* next[Shape::columns];
      RNNFAST_UNROLL
      for (int c = 0; c < Shape::columns; ++c) next[c] = source(p + 1, source_index[c], source_column[c]);
      await(from, inputs);
      multiply(weights, inputs, partials_of(p, warp));
      sync_block();
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i) {
        if (!exists[i] || !step.has_cell(p, column[i])) continue;
        const int n = own_column + i * cell_columns;
        State total[sums];
        add_partials(p, n, total);
        const typename Step::Outputs outputs = step.compute(p, column[i], own_unit, now[i], total, state[i]);
        if (step.sends(p, column[i])) {
          Real* out = args.exchange[direction] + Index(step.row(p, column[i])) * args.tiling.exchange_stride;
          step.for_each_sent(own_unit, outputs, [&](int k, Real value) {
            publish(InGlobal{}, reinterpret_cast<Bits*>(out + k), never_absent(value));
          });
        }
        step.store(p, column[i], column_of(n), own_unit, outputs, state[i], args.apart);
      }
      RNNFAST_UNROLL
      for (int c = 0; c < Shape::columns; ++c) from[c] = next[c];
    }

    if constexpr (Step::has_state) {
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i)
        if (exists[i]) step.keep_state(column_of(own_column + i * cell_columns), own_unit, state[i]);
    }
  }
};

template <class Step, class Shape>
RNNFAST_KERNEL(block_threads)
recur_resident(RNNFAST_ARGUMENT Arguments<Step> args) {
  if constexpr (has_tensor_cores) {
    const typename Step::Layer layer = args.layers[block_index().z];
    const Resident<Step, Shape> resident(args, layer);
    resident.run();
  } else {
    fail();
  }
}

}  // namespace rnnfast::cuda
