// The methods resident and resident_cluster: as grid and cluster, of blocks whose registers hold all weights and which
// multiply all of a group's columns at once. What a step does is known when this is compiled, but for the number of
// terms, so that few instructions stand between a vector's arrival and the numbers that it becomes; see recurrence.h for
// the rest, and handover.h for how vectors go round.
//
// For an LSTM forward a tile has two gates of eight units and its neighbour the other two, so that a lane has a unit's
// four sums side by side, and they go through shared memory 16 bytes at a time.
#pragma once

#include "handover.h"
#include "weights.h"

namespace rnnfast::cuda {

// What a block multiplies: so many tiles of rows, steps over k of a warp, at most, and tiles of columns.
template <int rows_, int steps_, int columns_>
struct Shape {
  static constexpr int rows = rows_, steps = steps_, columns = columns_;
};

template <class Step, class Shape, template <class, int, int> class Handover>
struct Resident {
  using Real = typename Step::Real;
  using State = float;
  using Tile = Mma<Real, 1>;
  static constexpr int sums = Step::sums, columns = Shape::columns * Tile::tile_columns;
  static constexpr int units = Shape::rows * Tile::tile_rows / sums;
  static constexpr int pitch = units * sums + 4;  // from one column of partial sums to the next, spread over the banks
  static constexpr int each = block_warps * Tile::step;
  using Sums = typename Tile::template SumsOf<(Shape::rows * Shape::columns < 8 ? 2 : 1)>;
  static constexpr int cell_columns = block_threads / units;  // of which the block's threads have a cell each
  static constexpr int cells = columns > cell_columns ? columns / cell_columns : 1;  // of a thread

  const Arguments<Step>& args;
  const int direction;
  const Step step;
  const int group, block, thread, lane, warp;
  const int own_unit, own_column;
  const int first_term, valid_steps;  // of this lane's numbers of a vector
  State* const partials;              // (2, warps, columns, pitch)
  const Handover<Step, columns, units> handover;

  RNNFAST_DEVICE explicit Resident(const Arguments<Step>& arguments, const typename Step::Layer& layer)
      : args(arguments),
        direction(computed_once(block_index().z)),
        step{args.shape, layer, args.carries[direction]},
        group(block_index().y),
        block(block_index().x),
        thread(thread_index()),
        lane(thread % 32),
        warp(thread / 32),
        own_unit(block * units + thread % units),
        own_column(thread / units),
        first_term(warp * Tile::step + Tile::first(lane)),
        valid_steps(steps_of_lane()),
        partials(reinterpret_cast<State*>(shared_memory_once() + args.shared.partials)),
        handover(args, step) {}

  RNNFAST_DEVICE int steps_of_lane() const {
    const int rest = args.tiling.exchange_stride - first_term;
    return rest > 0 ? (rest + each - 1) / each : 0;
  }

  // Whose column does not exist gets the group's last one, and nobody wants its sums.
  RNNFAST_DEVICE int column_of(int n) const {
    const int index = group * columns + n;
    return index < args.tiling.columns ? index : args.tiling.columns - 1;
  }
  RNNFAST_DEVICE bool has_column(int n) const { return n < columns && group * columns + n < args.tiling.columns; }

  using Inputs = uint4[Shape::columns][Shape::steps];

  template <class Use>
  RNNFAST_DEVICE void for_each_input(Use&& use) const {
    RNNFAST_UNROLL
    for (int i = 0; i < Shape::steps; ++i) {
      if (i > 0 && i >= args.tiling.k_steps) break;
      RNNFAST_UNROLL
      for (int c = 0; c < Shape::columns; ++c) use(c, i);
    }
  }
  RNNFAST_DEVICE uint4 read_one(const Real* from, int i) const {
    return handover.read(i < valid_steps ? from + i * each : handover.zeros);
  }

  // Reads again what is missing, and no more: where blocks ask L2, they all ask for the same numbers.
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
    Sums total[Shape::rows][Shape::columns] = {};
    RNNFAST_UNROLL
    for (int i = 0; i < Shape::steps; ++i) {
      if (i > 0 && i >= args.tiling.k_steps) break;
      RNNFAST_UNROLL
      for (int r = 0; r < Shape::rows; ++r) {
        RNNFAST_UNROLL
        for (int c = 0; c < Shape::columns; ++c)
          Tile::template multiply<Handover<Step, columns, units>::are_taken>(weights[r][i], inputs[c][i], total[r][c]);
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
    for (int half = block_warps / 2; half > 0; half /= 2) {  // in pairs, so that additions don't wait for each other
      RNNFAST_UNROLL
      for (int k = 0; k < half; ++k) {
        RNNFAST_UNROLL
        for (int sum = 0; sum < sums; ++sum) parts[k].of[sum] += parts[k + half].of[sum];
      }
    }
    RNNFAST_UNROLL
    for (int sum = 0; sum < sums; ++sum) total[sum] = parts[0].of[sum];
  }

  using Source = typename Handover<Step, columns, units>::Source;
  using Target = typename Handover<Step, columns, units>::Target;

  // Of the cells of a thread.
  struct Cell {
    int index;  // of the column, of all there are
    bool has_column, exists;
    typename Step::Column column;
    CellPlace place;  // in this step
    Target target;
  };

  RNNFAST_DEVICE void run() const {
    Weights weights;
    load(weights);
    handover.begin();
    Source source[Shape::columns];
    const Real* from[Shape::columns];
    RNNFAST_UNROLL
    for (int c = 0; c < Shape::columns; ++c) {
      const int n = c * Tile::tile_columns + lane / 4;
      source[c] = handover.source(args.begin, n, step.column(column_of(n)));
      from[c] = handover.first(source[c]) + first_term;
    }
    Cell cell[cells];
    State state[cells] = {};
    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i) {
      const int n = own_column + i * cell_columns, index = column_of(n);
      const typename Step::Column column = step.column(index);
      const CellPlace place = step.place(args.begin, column, own_unit);
      cell[i] = {index, has_column(n), has_column(n) && own_unit < int(args.shape.H), column, place,
                 handover.target(args.begin, n, column)};
      if (Step::has_state && cell[i].exists) state[i] = step.state_before(args.begin, index, own_unit);
    }
    const CellPlace on = step.places_on(1);
    const int steady_begin = step.steady_begin();
    const auto load_inputs = [&](int p, const CellPlace& further, typename Step::Inputs (&to)[cells]) {
      with_steadiness(step, p, steady_begin, [&](auto steady) {
        RNNFAST_UNROLL
        for (int i = 0; i < cells; ++i) {
          const Cell& of = cell[i];
          if (of.exists && (steady.value || step.has_cell(p, of.column)))
            to[i] = step.template load<steady.value>(p, of.column, own_unit, of.place + further);
        }
      });
    };
    typename Step::Inputs ahead[cells] = {};
    load_inputs(args.begin, {0, 0}, ahead);

    typename Step::Outputs outputs[cells] = {};
    RNNFAST_ROLL
    for (int p = args.begin; p < args.end; ++p) {
      Inputs inputs;
      for_each_input([&](int c, int i) { inputs[c][i] = read_one(from[c], i); });
      // What a cell reads comes a step ahead, and where vectors come from L2 behind those of this step.
      typename Step::Inputs now[cells];
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i) now[i] = ahead[i];
      if (!handover.is_far && p + 1 < args.end) load_inputs(p + 1, on, ahead);
      const Real* next[Shape::columns];
      RNNFAST_UNROLL
      for (int c = 0; c < Shape::columns; ++c) next[c] = handover.next(p, source[c]) + first_term;
      await(from, inputs);
      multiply(weights, inputs, partials_of(p, warp));
      for_each_input([&](int c, int i) {
        if (i < valid_steps) handover.empty(from[c] + i * each);
      });
      sync_block();
      with_steadiness(step, p, steady_begin, [&](auto steady) {
        RNNFAST_UNROLL
        for (int i = 0; i < cells; ++i) {
          Cell& of = cell[i];
          const bool has_cell = of.exists && (steady.value || step.has_cell(p, of.column));
          const bool sends = steady.value || step.sends(p, of.column);
          if (has_cell) {
            State total[sums];
            add_partials(p, own_column + i * cell_columns, total);
            outputs[i] = step.template compute<steady.value>(p, of.column, now[i], total, state[i]);
            if (sends) handover.put(p, of.target, own_unit, outputs[i]);
          }
          handover.pass_on(p, of.target, of.has_column && sends);
          if (has_cell)
            step.template store<steady.value>(p, of.column, of.index, own_unit, of.place, outputs[i], state[i],
                                              args.apart);
          of.place = of.place + on;
        }
      });
      if (handover.is_far && p + 1 < args.end) load_inputs(p + 1, {0, 0}, ahead);
      RNNFAST_UNROLL
      for (int c = 0; c < Shape::columns; ++c) from[c] = next[c];
    }

    RNNFAST_UNROLL
    for (int i = 0; i < cells; ++i)
      if (cell[i].exists) step.finish(cell[i].column, own_unit, outputs[i]);
    if constexpr (Step::has_state) {
      RNNFAST_UNROLL
      for (int i = 0; i < cells; ++i)
        if (cell[i].exists) step.keep_state(cell[i].index, own_unit, state[i]);
    }
    handover.end();
  }
};

template <class Step, class Shape, template <class, int, int> class Handover>
RNNFAST_KERNEL(block_threads)
recur_resident(RNNFAST_ARGUMENT Arguments<Step> args) {
  if constexpr (has_tensor_cores) {
    const typename Step::Layer layer = args.layers[block_index().z];
    const Resident<Step, Shape, Handover> resident(args, layer);
    resident.run();
  } else {
    fail();
  }
}

}  // namespace rnnfast::cuda
