// Which kernel for which problem: a pure function of the device's properties and the problem's sizes.
//
// A recurrence step multiplies a matrix of rows x terms weights by one vector for each of the problem's
// `columns`: forward rows = G*H, terms = H and columns = B; backward rows = H, terms = G*H and a column is
// a batch row of one truncation window. Blocks in a `group` share the weights' rows among them and hand
// their results round every step; groups own columns of their own and never meet.
//
//   local       the group is one block, whose registers hold all weights (local.h): no exchange; small layers
//   cluster     the group is a thread-block cluster, or one block; results go to its blocks' shared memory
//   grid        the group is any number of blocks, all resident at once; results go through L2
//   resident    as grid, of blocks whose registers hold all weights (resident.h): medium layers, on tensor cores
//   resident_cluster   the same as cluster: where as many blocks as a cluster has hold all weights
//   steps       a launch for every step: the fallback that never waits, so it needs no residency
//   gemm        a product by the caller's library and a launch for the cells, for every step: for problems so large
//               that the product is all there is. No truncation
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../rnnfast.h"
#include "device.h"

namespace rnnfast::cuda {

constexpr int block_threads = 256, block_warps = block_threads / 32;

enum class Format { float32, tf32, float64, float16, bfloat16 };
enum class Method { local, cluster, grid, resident, resident_cluster, steps, gemm };
enum class Pass { forward, backward };

struct Work {
  Pass pass;
  Format format;
  RecurrenceShape shape;
  int directions;  // 1, or 2 side by side
};

// The numbers of an engine (engine.h) that a plan depends on; instances.h holds them against the engine's own.
struct EngineTraits {
  bool tensor_cores;
  int tile_rows, tile_columns, step;
  int tile_bytes;      // of packed weights: tile_rows x step of them
  int column_tiles;    // that a warp multiplies at once
  int resident_tiles;  // of weights in a warp's registers
  int inputs_ahead;    // tiles' inputs that a warp loads together
  int row_tiles;       // side by side
  int real_bytes, state_bytes;
};

// On tensor cores: an LSTM has many rows and few terms forward, all else fewer rows, so that many tiles of rows go
// side by side.
constexpr int rows_side_by_side(Pass pass, Index gates) { return pass == Pass::forward && gates == 4 ? 2 : 1; }

constexpr EngineTraits engine_traits(Format format, bool tensor_cores, Pass pass, Index gates) {
  const int rows = rows_side_by_side(pass, gates);
  switch (format) {
    case Format::float64: return {false, 16, 8, 16, 2048, 1, 2, 1, 1, 8, 8};
    case Format::float32: return {false, 16, 8, 32, 2048, 1, 2, 1, 1, 4, 4};
    case Format::tf32: return {true, 16, 8, 16, 1024, 2, 8, 8, rows, 4, 4};
    default: break;
  }
  if (tensor_cores) return {true, 16, 8, 32, 1024, 2, 8, 8, rows, 2, 4};
  return {false, 16, 8, 64, 2048, 1, 2, 1, 1, 2, 4};
}

constexpr Index aligned(Index bytes) { return (bytes + 127) / 128 * 128; }

// Numbers from one vector to the next in shared memory: they begin 64 bytes apart modulo the 128 of all banks.
constexpr int vector_stride(Index terms, Index real_bytes) {
  return int((aligned(terms * real_bytes) + 64) / real_bytes);
}

// The method local: there are kernels for so many units, and for so many columns at once, 8 on tensor cores.
constexpr int local_units[] = {64, 128, 256}, local_columns[] = {1, 4, 8};

// Whether a block's registers hold the weights of so many units, and leave room to compute. `terms` are those of a row.
constexpr bool is_local(Format format, int columns, int units, int sums, int terms) {
  const int bits = format == Format::float64 ? 64 : format == Format::float16 || format == Format::bfloat16 ? 16 : 32;
  if (columns == 8) {
    if (format == Format::float32 || format == Format::float64) return false;
    const int tiles = units * sums / 16, warps = tiles < block_warps ? tiles : block_warps;
    return terms <= 256 && tiles / warps * terms * bits / 64 <= 128;
  }
  if (columns == 4 && bits == 16) return false;  // tensor cores are better at that
  const int rows = units > 64 ? 2 : 1, registers = rows * sums * terms / 4 * (bits == 64 ? 2 : 1);
  return registers <= 128 && units <= 128;
}

// The least units that have room for H, or 0.
constexpr int local_size(Format format, int columns, Pass pass, Index gates, Index H) {
  const bool forward = pass == Pass::forward;
  for (const int units : local_units)
    if (H <= units)
      return is_local(format, columns, units, forward ? int(gates) : 1, forward ? units : units * int(gates)) ? units
                                                                                                            : 0;
  return 0;
}

// The method resident: what a block multiplies. Tiles of rows, steps over k of a warp, at most, tiles of columns.
struct ResidentShape {
  int rows, steps, columns;
};

// Where a unit has four sums these lie in two tiles.
constexpr ResidentShape resident_shapes(int sums, int number) {
  constexpr ResidentShape of_four[] = {{4, 4, 1}, {4, 4, 2}, {2, 4, 1}, {2, 4, 2}};
  constexpr ResidentShape of_one[] = {{1, 8, 1}, {1, 8, 2}, {2, 4, 2}, {1, 12, 1}};
  return sums == 4 ? of_four[number] : of_one[number];
}
constexpr int resident_shape_count = 4;

// The method resident_cluster: fewer blocks, so of more rows; where a cell has much to remember, of few.
constexpr ResidentShape resident_cluster_shapes(int sums, int number) {
  constexpr ResidentShape of_four[] = {{4, 2, 1}, {8, 2, 1}};
  constexpr ResidentShape of_one[] = {{2, 8, 1}, {4, 4, 1}};
  return sums == 4 ? of_four[number] : of_one[number];
}
constexpr int resident_cluster_shape_count(Pass pass, Index gates) {
  return pass == Pass::backward && gates == 4 ? 1 : 2;
}

// The vectors of two steps take turns in its blocks' shared memory: see handover.h.
constexpr int resident_slots = 2;

// How a launch is cut up: what the kernel needs to know. A warp multiplies a bundle of `row_tiles` tiles of
// rows at once, by `column_tiles` tiles of columns; its tiles of weights lie in registers, then in shared memory, and
// the rest comes from L2 every step.
struct Tiling {
  int columns;           // of the problem
  int group_columns;     // of a group
  int pass_columns;      // multiplied between two barriers
  int bundles;           // in a block
  int k_steps;           // steps over k of one warp: the block's warps share the terms
  int register_steps;    // of these, for a warp's first bundle, with weights in registers
  int shared_tiles;      // of weights, for a warp, in shared memory
  int exchange_stride;   // numbers of a vector, with zeros at its end up to whole 16 bytes
  int zeros;             // numbers of a vector of zeros that stands in for what is not there
  int stride;            // numbers from one column to the next in shared memory (local, cluster)
  int partial_buffers;   // 2 in turn save a barrier
};

// In shared memory (local, cluster) the vectors of three steps take turns: see exchange.h.
constexpr int vector_slots = 3;

// Steps over k that are read together, at most (engine.h).
constexpr int zero_steps = 8;

// A block's shared memory: where what begins, in bytes. The kernel says what these are (recurrence.h).
struct SharedLayout {
  int columns, partials, states, weights, vectors, bytes;
};

// How much of what a step has to do in one block: what its estimate is made of (plan.cpp says more).
struct Counts {
  double items, trips, tiles, input_bytes, traffic_bytes, streamed_bytes, partial_bytes, cells, pushes;
  double occupied, handed_bytes, memory, peers, blocks, backward, rounded;
  double turns;  // that blocks take on a multiprocessor
};

struct Plan {
  Work work;
  Method method;
  EngineTraits engine;
  Tiling tiling;
  int local_units;  // that the kernel is made for (local)
  int shape;        // number of the kernel's (resident, resident_cluster)
  int blocks;       // in a group
  int groups;       // for each direction
  // What goes round in global memory is not the output: rows of that are no whole 16 bytes, or windows overlap.
  bool apart;
  SharedLayout shared;
  std::size_t weights_bytes;  // packed, for each direction
  std::size_t scratch_bytes;  // all the memory a call needs, packed weights included
  Counts counts;
  double cycles;              // estimated, for a step
  std::string reason;         // why there is a launch for every step; else empty
};

// Whether what cells read is more than L2 still has, of which it gets a part: then it is asked for early.
inline bool comes_from_memory(const Work& work) {
  constexpr Index bytes = 16 << 20;
  const RecurrenceShape& shape = work.shape;
  const Index real = work.format == Format::float64 ? 8
                     : work.format == Format::float16 || work.format == Format::bfloat16 ? 2 : 4;
  const Index gates = gate_count(shape.cell) * real;
  const Index cell = work.pass == Pass::forward ? gates : gates + real + (shape.cell == Cell::lstm ? 8 : real);
  return shape.T * shape.B * shape.H * cell * work.directions > bytes;
}

constexpr bool is_clustered(Method method) { return method == Method::cluster || method == Method::resident_cluster; }

// Whether vectors go through blocks' shared memory; whether registers hold all weights of a group of blocks.
inline bool has_vectors(const Plan& plan) {
  return plan.method == Method::local || is_clustered(plan.method);
}
constexpr bool is_resident(Method method) { return method == Method::resident || method == Method::resident_cluster; }

// Numbers that a cell hands to the next step.
constexpr Index numbers_sent(const Work& work) {
  return work.pass == Pass::forward ? 1 : gate_count(work.shape.cell);
}

// Where the bytes of a block's weights are from step to step. Those of the last block's missing rows count.
struct Residency {
  Index registers, shared, streamed;
};

Residency residency(const Plan& plan);

// Rows of weights that a block has room for.
Index block_rows(const Plan& plan);

// The best plan, or the best of one method. Throws std::invalid_argument where that method cannot run it.
Plan plan_recurrence(const Device& device, const Work& work);
Plan plan_recurrence(const Device& device, const Work& work, Method method);

// All that were weighed, for measurements of what the estimates are worth.
std::vector<Plan> all_plans(const Device& device, const Work& work, Method method);

constexpr const char* name(Format format) {
  switch (format) {
    case Format::float32: return "float32";
    case Format::tf32: return "tf32";
    case Format::float64: return "float64";
    case Format::float16: return "float16";
    case Format::bfloat16: break;
  }
  return "bfloat16";
}

constexpr const char* name(Method method) {
  switch (method) {
    case Method::local: return "local";
    case Method::cluster: return "cluster";
    case Method::grid: return "grid";
    case Method::resident: return "resident";
    case Method::resident_cluster: return "resident_cluster";
    case Method::gemm: return "gemm";
    case Method::steps: break;
  }
  return "steps";
}

// "rnnfast: CUDA recurrence forward (local) of LSTM, T 5, B 3, H 4": what an error names.
std::string describe(const Plan& plan);

// Memory of one call, in the order it lies in the scratch.
struct Scratch {
  std::size_t weights[2];  // packed
  std::size_t carry[2];    // backward (columns, H) State: dc on its way to the step before
  std::size_t starts[2];   // backward (columns that reach the initial state, H) State: their dh0
  std::size_t initial[2];  // grid and steps: (B or 0, exchange_stride) Real: h0, and a vector of zeros
  std::size_t exchange[2]; // grid and steps: (rows, exchange_stride) Real: what goes round, if the output can't be it
  std::size_t exchange_rows;  // T * B; where windows overlap 2 * columns
  std::size_t bytes;
};

Scratch scratch_layout(const Plan& plan);

// Numbers from one column of partial sums to the next; the 4 spread a tile's columns over the banks.
constexpr int partial_stride(const Tiling& tiling, int bundle_rows) {
  return tiling.bundles * bundle_rows + 4;
}

}  // namespace rnnfast::cuda
