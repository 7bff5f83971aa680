#include "plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace rnnfast::cuda {
namespace {

// What a step's work costs, in cycles of an H200: fitted by benchmarks/gpu_plans.py to the times of 2,535 plans in
// docs/cuda_plans.json. Of the plans of each kind half lie within 8 % of the estimate, nine in ten within 23 %.
// Those of float64 are of a fit to the first nine alone, as there are 33 plans of it.
struct Costs {
  double item;           // that stands between two barriers
  double trip;           // a wait for inputs that were loaded together
  double tile;           // of weights by one of columns, in any of the block's warps
  double input_byte;     // of vectors, through L2
  double traffic_byte;   // the same, for all blocks: they all ask for the same lines at the same time
  double streamed_byte;  // of weights, from L2
  double partial_byte;   // of partial sums, through shared memory
  double cell;           // of a thread, on the way to which others wait
  double push;           // of a thread, to a peer's shared memory
  double occupied;       // all of a block's threads with a cell each
  double handed_byte;    // of vectors, to a peer's shared memory
  double memory;         // where what cells read comes from memory
  double peer;           // a block of the group
  double block;          // any block of the launch
  double backward;       // what going back takes longer
  double rounded;        // a tile whose inputs are rounded to TF32 first
};

constexpr Costs tensor_core_costs{712, 910, 6.56, 0.00288, 2.03e-5, 0.0407, 0.0111, 434, 26.3, 592, 0.0108, 274, 9.56, 0.0922, 468, 4.53};
constexpr Costs resident_costs{537, 0, 0, 0.0314, 6.96e-5, 0, 0.021, 215, 0, 31.6, 0, 526, 10.3, 3.09, 30.2, 2.36};
constexpr Costs resident_cluster_costs{414, 0, 3.42, 0, 0, 0, 0.00597, 135, 24.4, 206, 0.0476, 0, 18, 0, 347, 0};
constexpr Costs fma_costs{716, 884, 0, 0.00363, 8.35e-5, 0.0197, 0.0504, 479, 25.3, 565, 0, 126, 8.11, 0, 415, 0};
constexpr Costs double_costs{2120, 1200, 0, 0.0144, 1.27e-4, 0.0199, 0.04, 0, 28.4, 0, 0, 0, 0, 0, 0, 0};

constexpr double launch_cycles = 8000;  // a kernel in a stream: published, not measured
// A product and a kernel, in the device's cycles: at least so many, which is what the host takes to queue them, or few
// blocks of a product; the kernel; the product's operations in a cycle, as if there were 64 columns at least; a byte of
// weights, which come from memory or L2. By hand, from the times of layers on an H200.
constexpr double gemm_rest = 8000, gemm_byte = 1e-3, gemm_columns = 64;
double gemm_least(Format format) { return format == Format::float16 || format == Format::bfloat16 ? 32e3 : 48e3; }
double gemm_rate(Format format) {
  switch (format) {
    case Format::float32:
    case Format::float64: return 12e3;
    case Format::tf32: return 75e3;
    default: return 130e3;
  }
}

// A cluster lies within one of the processor's own, of which each has so many multiprocessors; some have more, and
// some of those can't be had. An H200 has room for 66 clusters of 2, 30 of 4, 15 of 8, 7 of 10 to 16.
constexpr Index own_cluster = 16;
constexpr double clustered = 0.92;

Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// A step's matrix product: rows x terms weights by `columns` vectors.
struct Product {
  Index rows, terms, columns;
  bool whole;  // all columns must lie in one group
};

bool overlap(const Work& work) { return work.pass == Pass::backward && work.shape.k2 > work.shape.k1; }

Product product_of(const Work& work) {
  const RecurrenceShape& shape = work.shape;
  const Index G = gate_count(shape.cell);
  if (work.pass == Pass::forward) return {G * shape.H, shape.H, shape.B, false};
  const Index windows = ceil_div(shape.T, shape.k1);
  return {shape.H, G * shape.H, windows * shape.B, overlap(work)};
}

Index units_of_block(const Plan& plan) {
  const Index rows = Index(plan.tiling.bundles) * plan.engine.row_tiles * plan.engine.tile_rows;
  return plan.work.pass == Pass::forward ? rows / gate_count(plan.work.shape.cell) : rows;
}

Counts counts_of(const Plan& plan, const Product& product) {
  const Tiling& tiling = plan.tiling;
  const EngineTraits& engine = plan.engine;
  const double passes = double(ceil_div(tiling.group_columns, tiling.pass_columns));
  const Index column_tiles = ceil_div(tiling.pass_columns, engine.tile_columns);
  const Index rows = Index(tiling.bundles) * engine.row_tiles * engine.tile_rows;
  const Residency weights = residency(plan);
  const Index units = units_of_block(plan), at_once = block_threads / units;
  const bool is_long = plan.work.pass == Pass::backward && plan.work.shape.cell == Cell::lstm;  // twice another cell
  const double cells = (is_long ? 2 : 1) * passes * double(ceil_div(tiling.pass_columns, at_once));
  Counts counts{};
  counts.items = passes;
  counts.trips = passes * double(tiling.bundles * ceil_div(tiling.k_steps, engine.inputs_ahead / column_tiles));
  const Index weight_bytes = weights.registers + weights.shared + weights.streamed;
  counts.tiles = passes * double(weight_bytes / engine.tile_bytes * column_tiles);
  if (!has_vectors(plan)) {
    counts.input_bytes = passes * double(tiling.pass_columns * product.terms * engine.real_bytes * tiling.bundles);
    counts.traffic_bytes = counts.input_bytes * plan.blocks * plan.groups * plan.work.directions;
  }
  const Index streamed = weights.streamed + (plan.method == Method::steps ? weights.registers : 0);
  counts.streamed_bytes = passes * double(streamed);
  counts.partial_bytes = passes * double(2 * block_warps * tiling.pass_columns * rows * engine.state_bytes);
  counts.cells = cells;
  const Index here = std::min(tiling.group_columns, tiling.columns);
  counts.occupied = (is_long ? 2 : 1) * double(units * here) / block_threads;
  counts.memory = comes_from_memory(plan.work);
  counts.peers = plan.blocks;
  counts.backward = plan.work.pass == Pass::backward;
  counts.rounded = plan.work.format == Format::tf32 && plan.method != Method::resident_cluster ? counts.tiles : 0;
  counts.blocks = double(plan.blocks) * plan.groups * plan.work.directions;
  if (is_clustered(plan.method)) {
    counts.handed_bytes = double(here * product.terms * engine.real_bytes);
    const Index handed_on = numbers_sent(plan.work);
    counts.pushes = passes * double(ceil_div(tiling.pass_columns, at_once) * handed_on * plan.blocks);
  }
  return counts;
}

// Blocks that run one after the other on a multiprocessor, or have a share of it.
double waves(const Plan& plan, const Device& device) {
  const Index groups = Index(plan.groups) * plan.work.directions;
  if (!is_clustered(plan.method) || plan.blocks == 1)
    return double(ceil_div(groups * plan.blocks, device.multiprocessors));
  const Index clusters = Index(clustered * device.multiprocessors / own_cluster * (own_cluster / plan.blocks));
  return double(ceil_div(groups, std::max<Index>(1, clusters)));
}

// A step of the method local, of which a lane's chain of instructions is all. Fitted by hand; of 185 such plans in
// docs/cuda_plans.json half lie within 7 % of it, nine in ten within 23 %.
double local_cycles(const Plan& plan) {
  const bool forward = plan.work.pass == Pass::forward, lstm = plan.work.shape.cell == Cell::lstm;
  const int gates = int(gate_count(plan.work.shape.cell)), sums = forward ? gates : 1;
  const int units = plan.local_units, terms = forward ? units : units * gates, columns = plan.tiling.group_columns;
  if (columns == 8) {
    const int tiles = units * sums / plan.engine.tile_rows, warps = std::min(tiles, block_warps);
    const double cell = forward ? (lstm ? 614 : 191) : (lstm ? 853 : 228);
    const double cells = std::max(2.0, units * 8.0 / (32 * block_warps));  // of a lane
    return 21.0 * (tiles / warps) * (terms / plan.engine.step) + cell * cells;
  }
  const double rest = forward ? (lstm ? 458 : 110) : (lstm ? 515 : 223);
  const int bytes = plan.engine.real_bytes, rows = (units > 64 ? 2 : 1) * sums;
  const double reads = columns * terms / 4.0 / (16 / bytes), products = rows * columns * terms / 4.0;
  const double sharing = columns > 1 ? 53.0 * rows : 0;  // sums out among lanes
  return rest + 30.5 * reads + (bytes == 4 ? 1.4 : bytes == 2 ? 5.4 : 6.2) * products + sharing;
}

double step_cycles(const Plan& plan) {
  const Costs& costs = plan.method == Method::resident_cluster ? resident_cluster_costs
                       : plan.method == Method::resident ? resident_costs
                       : plan.engine.tensor_cores ? tensor_core_costs
                       : plan.engine.state_bytes == 8 ? double_costs
                                                      : fma_costs;
  const Counts counts = plan.counts;
  const double cycles = counts.items * costs.item + counts.trips * costs.trip + counts.tiles * costs.tile +
                        counts.input_bytes * costs.input_byte + counts.traffic_bytes * costs.traffic_byte +
                        counts.streamed_bytes * costs.streamed_byte + counts.partial_bytes * costs.partial_byte +
                        counts.cells * costs.cell + counts.pushes * costs.push + counts.occupied * costs.occupied +
                        counts.handed_bytes * costs.handed_byte + counts.memory * costs.memory +
                        counts.peers * costs.peer + counts.blocks * costs.block + counts.backward * costs.backward +
                        counts.rounded * costs.rounded;
  return counts.turns * cycles + (plan.method == Method::steps ? launch_cycles : 0);
}

// Where everything but the weights begins; these come next, then the vectors.
SharedLayout shared_layout(const Plan& plan) {
  const Tiling& tiling = plan.tiling;
  const EngineTraits& engine = plan.engine;
  const Index bundle_rows = Index(engine.row_tiles) * engine.tile_rows;
  Index bytes = 0;
  const auto take = [&](Index more) {
    const Index begin = bytes;
    bytes += aligned(more);
    return int(begin);
  };
  SharedLayout layout{};
  layout.columns = take(plan.work.pass == Pass::forward ? 0 : Index(tiling.group_columns) * 16);
  layout.partials = take(Index(tiling.partial_buffers) * block_warps * tiling.pass_columns *
                         partial_stride(tiling, int(bundle_rows)) * engine.state_bytes);
  const bool has_state = plan.work.shape.cell == Cell::lstm;
  layout.states = take(has_state ? Index(tiling.group_columns) * units_of_block(plan) * engine.state_bytes : 0);
  layout.weights = take(Index(block_warps) * tiling.shared_tiles * engine.tile_bytes);
  const Index vectors = vector_slots * Index(tiling.group_columns) * tiling.stride + tiling.zeros;
  layout.vectors = take(has_vectors(plan) ? vectors * engine.real_bytes : 0);
  layout.bytes = int(std::min<Index>(bytes, std::numeric_limits<int>::max()));
  return layout;
}

// The plan for `row_blocks` blocks or a few less, or false where shared memory can't hold what it must.
bool fill_in(const Device& device, const Product& product, int row_blocks, Index group_columns, Plan& plan) {
  const EngineTraits& engine = plan.engine;
  Tiling& tiling = plan.tiling;
  const Index row_tiles = ceil_div(product.rows, engine.tile_rows);
  Index of_block = ceil_div(row_tiles, row_blocks);
  tiling.bundles = int(ceil_div(of_block, engine.row_tiles));
  of_block = Index(tiling.bundles) * engine.row_tiles;
  plan.blocks = int(ceil_div(row_tiles, of_block));
  if (plan.method == Method::cluster && plan.blocks != row_blocks) return false;
  if (units_of_block(plan) > block_threads) return false;

  tiling.columns = int(product.columns);
  tiling.group_columns = int(group_columns);
  tiling.pass_columns =
      int(std::min<Index>(group_columns, Index(engine.column_tiles) * engine.tile_columns));
  plan.groups = int(ceil_div(product.columns, group_columns));
  tiling.k_steps = int(ceil_div(ceil_div(product.terms, engine.step), block_warps));
  const Index chunk = 16 / engine.real_bytes, each = Index(engine.step) * block_warps;
  tiling.zeros = int(std::max<Index>(tiling.k_steps, zero_steps) * each);
  tiling.exchange_stride = int(ceil_div(product.terms, chunk) * chunk);
  plan.apart = !has_vectors(plan) && (tiling.exchange_stride != product.terms || product.whole);
  tiling.stride = has_vectors(plan) ? vector_stride(product.terms, engine.real_bytes) : 0;

  tiling.register_steps = tiling.shared_tiles = 0;
  Index others = 0;  // tiles that are not in a warp's registers
  tiling.register_steps = std::min(tiling.k_steps, engine.resident_tiles / engine.row_tiles);
  if (plan.method != Method::steps)  // which would read them once
    others = (Index(tiling.bundles) * tiling.k_steps - tiling.register_steps) * engine.row_tiles;
  // A second buffer of partial sums is worth less than weights on the chip.
  for (tiling.partial_buffers = 2; tiling.partial_buffers > 0; --tiling.partial_buffers) {
    tiling.shared_tiles = 0;
    const Index room = device.shared_bytes - shared_layout(plan).bytes;
    if (room < 0) continue;
    tiling.shared_tiles = int(std::min(others, room / (Index(block_warps) * engine.tile_bytes)));
    if (tiling.shared_tiles == others || tiling.partial_buffers == 1) break;
  }
  if (tiling.partial_buffers == 0) return false;
  plan.shared = shared_layout(plan);
  plan.weights_bytes = std::size_t(Index(plan.blocks) * of_block * tiling.k_steps * block_warps *
                                   engine.tile_bytes);
  return true;
}

// The same for a shape of the method resident; false where its registers don't hold the weights.
bool fill_in_resident(const Device& device, const Product& product, Plan& plan) {
  const int sums = int(product.rows / plan.work.shape.H);
  const bool clustered = plan.method == Method::resident_cluster;
  const auto shapes = clustered ? resident_cluster_shapes : resident_shapes;
  const ResidentShape shape = shapes(sums, plan.shape);
  EngineTraits& engine = plan.engine;
  engine.row_tiles = shape.rows;
  engine.column_tiles = shape.columns;
  engine.resident_tiles = shape.rows * shape.steps;
  engine.inputs_ahead = shape.columns * shape.steps;
  const Index columns = Index(shape.columns) * engine.tile_columns;
  if (shape.columns > 1 && product.columns <= columns - engine.tile_columns) return false;
  const Index row_blocks = ceil_div(ceil_div(product.rows, engine.tile_rows), shape.rows);
  if (!fill_in(device, product, int(row_blocks), columns, plan)) return false;
  if (plan.tiling.k_steps > shape.steps || plan.tiling.bundles != 1) return false;
  if (clustered && (plan.blocks > device.largest_cluster || plan.work.shape.H * engine.real_bytes % 16 != 0))
    return false;
  for (int other = 0; other < plan.shape; ++other) {  // that would do the same
    const ResidentShape before = shapes(sums, other);
    if (before.rows == shape.rows && before.columns == shape.columns && plan.tiling.k_steps <= before.steps)
      return false;
  }
  plan.shared = {};
  const Index pitch = Index(shape.rows) * engine.tile_rows + 4;
  plan.shared.vectors = plan.shared.bytes = int(aligned(2 * block_warps * columns * pitch * engine.state_bytes));
  if (clustered) {
    const Index vectors = resident_slots * columns * plan.tiling.stride + plan.tiling.zeros;
    plan.shared.bytes += int((vectors + block_warps * numbers_sent(plan.work) * 32) * engine.real_bytes);
  }
  return plan.shared.bytes <= device.shared_bytes;
}

bool can_run(const Device& device, const Plan& plan) {
  if (plan.method == Method::gemm)
    return plan.work.pass == Pass::forward || plan.work.shape.k1 >= plan.work.shape.T;
  if (plan.groups > 65535) return false;  // the grid's second dimension
  if (plan.method == Method::resident_cluster) return !overlap(plan.work);
  if (plan.method != Method::grid && plan.method != Method::resident) return true;
  // Overlapping windows' da would need more memory than is to be had, if each step had a place of its own.
  if (overlap(plan.work)) return false;
  return device.cooperative &&
         Index(plan.blocks) * plan.groups * plan.work.directions <= device.multiprocessors;
}

// All ways of cutting the problem up for one method: use(plan) for each that can run.
template <class Use>
void for_each_plan(const Device& device, const Work& work, Method method, Use&& use) {
  const Product product = product_of(work);
  const bool tensor_cores = device.capability >= 80;
  if (work.format == Format::tf32 && !tensor_cores)
    throw std::invalid_argument("TF32 needs compute capability 8.0, the device has " +
                                std::to_string(device.capability / 10) + "." +
                                std::to_string(device.capability % 10));
  Plan plan{};
  plan.work = work;
  plan.method = method;
  plan.engine = engine_traits(work.format, tensor_cores, work.pass, gate_count(work.shape.cell));
  const Index tiles = ceil_div(product.rows, plan.engine.tile_rows);
  const auto try_blocks = [&](Index row_blocks) {
    const Index widest = ceil_div(product.columns, plan.engine.tile_columns) * plan.engine.tile_columns;
    Index group_columns = product.whole ? widest : plan.engine.tile_columns;
    for (bool last = false; !last; group_columns *= 2) {
      last = group_columns >= widest;
      if (!fill_in(device, product, int(row_blocks), std::min(group_columns, widest), plan) ||
          !can_run(device, plan))
        continue;
      plan.counts = counts_of(plan, product);
      plan.counts.turns = waves(plan, device);
      plan.cycles = step_cycles(plan);
      plan.scratch_bytes = scratch_layout(plan).bytes;
      use(plan);
    }
  };
  if (method == Method::gemm) {
    if (!can_run(device, plan)) return;
    plan.blocks = int(ceil_div(work.shape.B * work.shape.H, block_threads));
    plan.groups = 1;
    plan.tiling.columns = plan.tiling.group_columns = plan.tiling.pass_columns = int(product.columns);
    const double weights = double(product.rows) * double(product.terms);
    const double operations = 2 * weights * std::max(gemm_columns, double(product.columns));
    const double read = weights * plan.engine.real_bytes * gemm_byte;
    const double multiplied = std::max(operations / gemm_rate(work.format), read);
    plan.cycles = work.directions * std::max(gemm_least(work.format), gemm_rest + multiplied);
    use(plan);
  } else if (method == Method::local) {
    if (product.whole) return;
    plan.blocks = 1;
    plan.tiling.columns = int(product.columns);
    for (const int columns : local_columns) {
      plan.local_units = local_size(work.format, columns, work.pass, gate_count(work.shape.cell), work.shape.H);
      if (plan.local_units == 0 || (columns == 8 && !tensor_cores)) continue;
      plan.tiling.group_columns = plan.tiling.pass_columns = columns;
      plan.groups = int(ceil_div(product.columns, columns));
      const Index terms = product.terms / work.shape.H * plan.local_units;
      plan.shared.bytes = 2 * columns * vector_stride(terms, plan.engine.real_bytes) * plan.engine.real_bytes;
      const Index sums = product.rows / work.shape.H;
      plan.weights_bytes = std::size_t(plan.local_units * sums * terms * plan.engine.real_bytes);
      if (!can_run(device, plan)) continue;
      const double turns = waves(plan, device);  // blocks side by side on a multiprocessor help each other wait
      plan.cycles = (turns > 1 ? 0.8 * turns : 1) * local_cycles(plan);
      plan.scratch_bytes = scratch_layout(plan).bytes;
      use(plan);
    }
  } else if (is_resident(method)) {
    if (!plan.engine.tensor_cores) return;
    const int shapes = method == Method::resident ? resident_shape_count
                                                  : resident_cluster_shape_count(work.pass, gate_count(work.shape.cell));
    for (plan.shape = 0; plan.shape < shapes; ++plan.shape) {
      if (!fill_in_resident(device, product, plan) || !can_run(device, plan)) continue;
      plan.counts = counts_of(plan, product);
      plan.counts.turns = waves(plan, device);
      plan.cycles = step_cycles(plan);
      plan.scratch_bytes = scratch_layout(plan).bytes;
      use(plan);
    }
  } else if (method == Method::cluster) {
    for (Index blocks = 1; blocks <= std::min<Index>(tiles, device.largest_cluster); blocks *= 2)
      try_blocks(blocks);
  } else {
    const Index most = method == Method::grid ? std::min<Index>(tiles, device.multiprocessors) : tiles;
    for (Index of_block = ceil_div(tiles, most); ; of_block += std::max<Index>(1, of_block / 4)) {
      try_blocks(ceil_div(tiles, of_block));
      if (of_block >= tiles || (method == Method::steps && of_block > 64)) break;
    }
  }
}

// The best of one method; false where none can run.
bool plan_method(const Device& device, const Work& work, Method method, Plan& best) {
  bool found = false;
  for_each_plan(device, work, method, [&](const Plan& plan) {
    if (!found || plan.cycles < best.cycles) best = plan;
    found = true;
  });
  return found;
}

void check(const Device& device, const Work& work) {
  const Product product = product_of(work);
  const Index most = std::numeric_limits<int>::max() / 4;
  if (work.shape.T > most || work.shape.T * work.shape.B > most || product.columns > most ||
      product.terms > most || product.rows > most)
    throw std::invalid_argument("T * B, the windows' batch rows, or G*H are more than a CUDA kernel counts");
  if (device.capability < 75)
    throw std::invalid_argument("the CUDA kernels need compute capability 7.5, the device has " +
                                std::to_string(device.capability / 10) + "." +
                                std::to_string(device.capability % 10));
}

}  // namespace

Residency residency(const Plan& plan) {
  if (plan.method == Method::local) return {Index(plan.weights_bytes), 0, 0};
  const Tiling& tiling = plan.tiling;
  const Index row_tiles = plan.engine.row_tiles, all_warps = Index(block_warps) * plan.engine.tile_bytes;
  const Index registers = tiling.register_steps * row_tiles;  // tiles of a warp
  const Index others = tiling.bundles * tiling.k_steps * row_tiles - registers;
  const Index shared = std::min<Index>(tiling.shared_tiles, others);
  return {all_warps * registers, all_warps * shared, all_warps * (others - shared)};
}

Index block_rows(const Plan& plan) {
  if (plan.method == Method::local)
    return plan.local_units * (plan.work.pass == Pass::forward ? gate_count(plan.work.shape.cell) : 1);
  return Index(plan.tiling.bundles) * plan.engine.row_tiles * plan.engine.tile_rows;
}

Plan plan_recurrence(const Device& device, const Work& work, Method method) {
  check(device, work);
  Plan plan{};
  if (plan_method(device, work, method, plan)) return plan;
  throw std::invalid_argument(std::string("the method ") + name(method) +
                              " cannot run this problem on this device");
}

std::vector<Plan> all_plans(const Device& device, const Work& work, Method method) {
  check(device, work);
  std::vector<Plan> plans;
  for_each_plan(device, work, method, [&](const Plan& plan) { plans.push_back(plan); });
  return plans;
}

Plan plan_recurrence(const Device& device, const Work& work) {
  check(device, work);
  Plan best{};
  bool found = false;
  for (const Method method :
       {Method::local, Method::cluster, Method::grid, Method::resident, Method::resident_cluster}) {
    Plan plan{};
    if (!plan_method(device, work, method, plan)) continue;
    if (!found || plan.cycles < best.cycles) best = plan;
    found = true;
  }
  const bool resident = found;
  for (const Method method : {Method::steps, Method::gemm}) {
    Plan plan{};
    if (!plan_method(device, work, method, plan) || (found && plan.cycles >= best.cycles)) continue;
    best = plan;
    best.reason = resident ? "a launch for every step is estimated to be faster"
                           : "the blocks of a whole recurrence would not all be resident";
    found = true;
  }
  if (!found) throw std::invalid_argument("no CUDA kernel fits this device's shared memory");
  return best;
}

std::string describe(const Plan& plan) {
  const RecurrenceShape& shape = plan.work.shape;
  return std::string("rnnfast: CUDA recurrence ") + (plan.work.pass == Pass::forward ? "forward" : "backward") + " (" +
         name(plan.method) + ") of " + (shape.cell == Cell::lstm ? "LSTM" : "RNN") + ", T " + std::to_string(shape.T) +
         ", B " + std::to_string(shape.B) + ", H " + std::to_string(shape.H);
}

Scratch scratch_layout(const Plan& plan) {
  const RecurrenceShape& shape = plan.work.shape;
  const EngineTraits& engine = plan.engine;
  Scratch scratch{};
  const auto take = [&](std::size_t (&offsets)[2], Index bytes) {
    for (int direction = 0; direction < plan.work.directions; ++direction) {
      offsets[direction] = scratch.bytes;
      scratch.bytes += std::size_t(aligned(bytes));
    }
  };
  take(scratch.weights, Index(plan.weights_bytes));
  const Index columns = plan.tiling.columns, vector_bytes = Index(plan.tiling.exchange_stride) * engine.real_bytes;
  if (plan.work.pass == Pass::backward) {
    take(scratch.carry, shape.cell == Cell::lstm ? columns * shape.H * engine.state_bytes : 0);
    take(scratch.starts, columns * shape.H * engine.state_bytes);
  }
  if (!has_vectors(plan))
    take(scratch.initial, (plan.work.pass == Pass::forward ? shape.B : 0) * vector_bytes +
                              Index(plan.tiling.zeros) * engine.real_bytes);
  scratch.exchange_rows = std::size_t(overlap(plan.work) ? 2 * columns : shape.T * shape.B);
  if (plan.apart) take(scratch.exchange, Index(scratch.exchange_rows) * vector_bytes);
  return scratch;
}

}  // namespace rnnfast::cuda
