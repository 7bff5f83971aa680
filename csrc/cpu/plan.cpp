#include "plan.h"

#include <unistd.h>

#include <algorithm>

namespace rnnfast::cpu {
namespace {

constexpr double barrier_cycles = 800;       // a hand-over between cores, there and back
constexpr double region_cycles = 15000;      // waking the pool and joining it
constexpr double cell_cycles_per_gate = 15;  // nonlinearities, for a vector of units
constexpr double spread_cycles = 4;          // moving a vector of sums

Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// Where threads share steps, a chunk has rows for so many tiles of each: enough to use the weights often, few enough
// for what lies outside of the overlap, the first chunk's products and the last one's recurrence.
constexpr Index tiles_ahead = 4;

// One thread's work in one step: `rows` batch rows by `vectors` vectors of hidden units.
struct StepCycles {
  double recurrence, products;
  double total() const { return recurrence + products; }
};

StepCycles step_cycles(const Recurrence& work, const Engine& engine, Index rows, Index vectors) {
  const double columns = double(vectors * work.gates);
  // Fewer than two rows leave too few independent sums to cover the latency of an FMA.
  const double multiply = double(work.terms) * columns * std::max(double(rows) / 2, 1.0);
  const double weights =
      double(work.terms) * columns * double(engine.vector_width * engine.real_bytes);
  const double bytes_per_cycle =
      weights <= double(engine.l1_bytes) ? 96 : weights <= double(engine.l2_bytes) ? 40 : 8;
  const double cell = double(rows * vectors * work.gates) * cell_cycles_per_gate;
  const double products = double(work.product_terms) * columns * double(rows) / 2;
  return {std::max(multiply, weights / bytes_per_cycle) + cell, products};
}

// Whether vectors that are saved in the products outweigh those that are moved, and a block of rows of sums stays
// in the L2 cache meanwhile.
bool dense_pays(const LayerShape& shape, Index product_terms, const Engine& engine) {
  const Index gates = gate_count(shape.cell), columns = gates * shape.H;
  const Index moved = gates * ceil_div(shape.H, engine.vector_width);
  const Index saved = moved - ceil_div(columns, engine.vector_width);
  return double(saved * product_terms) / 2 > spread_cycles * double(moved) &&
         engine.row_block * columns * engine.real_bytes <= engine.l2_bytes / 2;
}

// Weights going back are read row by row, as they lie: unpacked rows cost but their distance, which is little for one
// pass of a block of rows, and more with each pass, all the more where there are more pages than the processor
// remembers addresses of. Packing reads and writes all of them.
bool packing_pays_back(Index steps, Index rows, Index w_hh_bytes, const Engine& engine) {
  const Index most_steps = w_hh_bytes <= 8 * engine.l2_bytes ? 8 : 2;
  return steps > most_steps || steps * rows > engine.row_block;
}

// A projected h is computed from what all threads have made of the cells.
Index barriers_of(const LayerShape& shape) { return shape.projection > 0 ? 2 : 1; }

}  // namespace

Plan plan_recurrence(const Recurrence& work, const Engine& engine, int threads) {
  const Index vectors = ceil_div(work.units, engine.vector_width);
  // All steps, where one of so many that share the rows has so many of the vectors.
  const auto cycles_of = [&](Index sharers, Index own_vectors) {
    const auto at = [&](Index step) {
      return step_cycles(work, engine, ceil_div(work.rows_at(step), sharers), own_vectors);
    };
    if (!work.offsets) {
      const StepCycles one = at(0);
      return StepCycles{double(work.steps) * one.recurrence, double(work.steps) * one.products};
    }
    StepCycles all{};
    for (Index step = 0; step < work.steps; ++step) {
      all.recurrence += at(step).recurrence;
      all.products += at(step).products;
    }
    return all;
  };
  // How many steps have so many rows, where so many threads share them.
  const auto steps_of = [&](Index rows, Index sharers) {
    return std::clamp<Index>(rows / std::max<Index>(ceil_div(work.rows, sharers), 1), 1, std::max<Index>(work.steps, 1));
  };
  const Index most_rows = work.steps > 0 ? work.rows_at(0) : 0;
  const StepCycles alone = cycles_of(1, vectors);
  Plan best{};
  best.threads = 1;
  best.split = Split::rows;
  best.cycles = alone.total();
  const auto consider = [&](int count, Split split, double cycles) {
    if (cycles + region_cycles >= best.cycles) return;
    best.threads = count;
    best.split = split;
    best.cycles = cycles + region_cycles;
  };
  for (int count = 2; count <= threads; count = count == threads ? count + 1
                                               : std::min(2 * count, threads)) {
    if (most_rows >= count) consider(count, Split::rows, cycles_of(count, vectors).total());
    if (vectors >= count)
      consider(count, Split::units,
               cycles_of(1, ceil_div(vectors, count)).total() + double(work.steps * work.barriers) * barrier_cycles);
    const Index chunk = steps_of(count * tiles_ahead * engine.tile_rows, 1);
    if (work.products_first && chunk >= count) {
      // Nothing is there to be computed beside the first chunk's products, nor beside the last one's recurrence.
      const Index chunks = ceil_div(work.steps, chunk);
      const double between = double(chunks - 1) * std::max(alone.recurrence, alone.total() / count);
      consider(count, Split::steps,
               (alone.products / count + between + alone.recurrence) / double(chunks) + double(chunks) * barrier_cycles);
    }
  }
  best.pack = work.steps * work.rows >= engine.packing_pays;
  if (best.split == Split::steps) {
    best.chunk = steps_of(best.threads * tiles_ahead * engine.tile_rows, 1);
    best.own_share = std::max(alone.total() / best.threads - alone.recurrence, 0.0) / alone.products;
  } else {
    best.chunk = steps_of(engine.row_block, best.split == Split::rows ? best.threads : 1);
  }
  return best;
}

Plan plan_forward(const LayerShape& shape, const Engine& engine, bool frozen) {
  const auto lanes = [&](Index terms) { return ceil_div(terms, engine.terms); };
  Plan plan = plan_recurrence(
      {shape.T, shape.mean_rows(), shape.H, gate_count(shape.cell),
       lanes(shape.h_size()) + ceil_div(lanes(shape.projection), gate_count(shape.cell)), lanes(shape.I), shape.offsets,
       barriers_of(shape), true},
      engine, shape.threads);
  plan.pack = plan.pack || frozen;
  plan.dense = plan.pack && plan.split != Split::units && dense_pays(shape, lanes(shape.I), engine);
  return plan;
}

Plan plan_backward(const LayerShape& shape, Index k1, Index k2, bool want_dx, const Engine& engine) {
  const Index gates = gate_count(shape.cell);
  const Index product_terms =
      gates * ((want_dx ? shape.I : 0) + shape.I + shape.h_size()) + shape.projection;
  const Index windows = ceil_div(shape.T, k1);
  const auto lanes = [&](Index terms) { return ceil_div(terms, engine.terms); };
  const Index* offsets = windows == 1 ? shape.offsets : nullptr;  // windows of several blocks: the mean will do
  const Index rows = windows * shape.mean_rows();
  Plan plan = plan_recurrence({k2, rows, shape.H, 1, lanes(gates * shape.h_size() + shape.projection),
                               lanes(product_terms), offsets, barriers_of(shape)},
                              engine, shape.threads);
  plan.pack = packing_pays_back(k2, rows, gates * shape.H * shape.h_size() * engine.real_bytes, engine);
  return plan;
}

// Only some C libraries tell, and some answer 0: then a common size stands in.
Index l1_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 << 10;
}

Index l2_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

Index l3_cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 16 << 20;
}

}  // namespace rnnfast::cpu
