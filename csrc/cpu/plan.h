// How a recurrence is shared between threads: a pure function of sizes.
//
// Rows of the batch are independent, so threads that own rows never wait for each other, but each reads
// all of W_hh every step. Threads that own hidden units read only their slice, which may then stay in
// their core's cache, but meet at a barrier every step. Small problems are not worth waking a second
// thread for. The estimate below is in cycles; it only has to rank the choices.
#pragma once

#include "../rnnfast.h"

namespace rnnfast::cpu {

// What the estimate needs to know of the kernels and the machine.
struct Engine {
  Index vector_width;  // lanes of the working type
  Index real_bytes;
  Index tile_rows;
  Index l1_bytes, l2_bytes;  // of one core
};

// `rows` sequences of `steps` steps; a step multiplies a row of `terms` numbers by weights for `units`
// hidden units with `gates` sums each. The products over all steps that go with it are counted as so many
// more terms a sum; they share out evenly.
struct Recurrence {
  Index steps, rows, units, gates, terms, product_terms;
};

enum class Split { rows, units };

struct Plan {
  int threads;
  Split split;
  double cycles;  // estimated
};

Plan plan_recurrence(const Recurrence& work, const Engine& engine, int threads);

// Cache sizes of this machine, read once.
Index l1_cache_bytes();
Index l2_cache_bytes();

}  // namespace rnnfast::cpu
