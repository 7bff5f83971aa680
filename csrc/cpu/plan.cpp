#include "plan.h"

#include <unistd.h>

#include <algorithm>

namespace rnnfast::cpu {
namespace {

// Fitted to the times of 170 small layers on one and two threads (docs/performance.md).
constexpr double barrier_cycles = 1000;      // a hand-over between cores, there and back
constexpr double cell_cycles_per_gate = 30;  // nonlinearities, for a vector of units
constexpr double fma_bytes = 64;             // of sums, to which a cycle adds a term each
constexpr double fma_latency = 4;
constexpr double spread_cycles = 4;          // moving a vector of sums
constexpr Index meetings_back = 4;           // packed, computed again, gone back, multiplied
constexpr Index panel_vectors = 4;           // tile_vectors, the same for every instruction set

// Handing work to the pool's threads, who still wait for it, and joining them. Two take 5000, or 13,000
// and more while lines take long from core to core, those of the work itself too: it is shared from where both are a
// gain. More threads were not measured.
double region_cycles(int threads) { return std::min(7500.0 * threads, 30000.0); }

// Bytes of weights that come in a cycle from the smallest cache that holds all of them.
double bytes_per_cycle(double bytes, const Engine& engine) {
  return bytes <= double(engine.l1_bytes) ? 96 : bytes <= double(engine.l2_bytes) ? 24 : 20;
}

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
  const Index columns = vectors * work.gates;
  const double vector_bytes = double(engine.vector_width * engine.real_bytes);
  // A tile adds a term to each of its sums; where they are few, it waits for the ones before.
  const auto tile = [&](Index width) { return std::max(double(rows * width) * vector_bytes / fma_bytes, fma_latency); };
  const double term = double(columns / panel_vectors) * tile(panel_vectors) +
                      (columns % panel_vectors > 0 ? tile(columns % panel_vectors) : 0);
  const auto bytes = [&](Index terms) { return double(terms * columns) * vector_bytes; };
  const auto read = [&](Index terms) { return bytes(terms) / bytes_per_cycle(bytes(terms), engine); };
  // Reading hides behind the arithmetic, or that behind reading; from beyond the L2 cache by half.
  const double sums = double(work.terms) * term, weights = read(work.terms);
  const double hidden = std::min(sums, weights) * (bytes(work.terms) <= double(engine.l2_bytes) ? 1 : 0.5);
  const double cells = double(rows * columns) * cell_cycles_per_gate;
  // A block of rows, of several steps, reads the weights of the products once.
  const Index steps_of_block =
      std::clamp<Index>(engine.row_block / std::max<Index>(rows, 1), 1, std::max<Index>(work.steps, 1));
  const double products = std::max(bytes(work.product_terms) / fma_bytes * double(rows),
                                   read(work.product_terms) / double(steps_of_block));
  return {sums + weights - hidden + cells, products};
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
    cycles += region_cycles(count) + double(work.meetings) * barrier_cycles;
    if (cycles >= best.cycles) return;
    best.threads = count;
    best.split = split;
    best.cycles = cycles;
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
                               lanes(product_terms), offsets, barriers_of(shape), false, meetings_back},
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
