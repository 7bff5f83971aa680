// How a layer is computed: a pure function of sizes.
//
// Rows of the batch are independent, so threads that own rows never wait for each other, but each reads
// all of W_hh every step. Threads that own hidden units read only their slice, which may then stay in
// their core's cache, but meet at a barrier every step. Small problems are not worth waking a second
// thread for. The estimate below is in cycles; it only has to rank the choices.
//
// A chunk of steps is projected, then run through: as many steps as make a full block of rows of one thread,
// so that the projection uses its weights often, and its results are still in cache when the recurrence
// comes by.
//
// Going forward, no projection waits for the recurrence. Where a step is too little work to share, one thread
// computes the recurrence, and the others project the next chunk meanwhile; the first helps as far as that is
// even, and all meet once a chunk.
//
// The recurrence has the four gates of a vector of hidden units side by side, so with 20 units in vectors of 16
// it computes 8 vectors where 5 hold all columns. The projection, whose sums nobody needs gate by gate, can do
// with the 5, for the price of moving its sums to where the recurrence adds to them.
#pragma once

#include "../rnnfast.h"

namespace rnnfast::cpu {

// What the estimate needs to know of the kernels and the machine.
struct Engine {
  Index vector_width;  // lanes of the working type
  Index real_bytes;
  Index tile_rows;
  Index row_block;  // rows that pass over the weights together
  Index l1_bytes, l2_bytes;  // of one core
  Index terms = 1;           // of a sum that are multiplied at a time, in a lane of `real_bytes`
  // Fewer uses of a weight than this, going forward, do not pay for packing it, nor for seeing that it is the one that
  // was packed before: single steps of a few rows, and a few steps of one.
  Index packing_pays = 9;
};

// `rows` sequences of `steps` steps; a step multiplies a row of `terms` numbers by weights for `units`
// hidden units with `gates` sums each. The products over all steps that go with it are counted as so many
// more terms a sum; they share out evenly. With packed sequences, `rows` is the mean.
struct Recurrence {
  Index steps, rows, units, gates, terms, product_terms;
  const Index* offsets = nullptr;  // of packed sequences, as in LayerShape
  Index barriers = 1;              // of a step, where threads share units
  bool products_first = false;     // they need nothing of the recurrence
  Index meetings = 0;              // barriers outside of steps

  Index rows_at(Index step) const { return offsets ? offsets[step + 1] - offsets[step] : rows; }
};

// By what threads share the work. By steps: of the products alone, and the first thread computes the recurrence.
enum class Split { rows, units, steps };

struct Plan {
  int threads;
  Split split;
  bool pack;      // the weights; else they are read where they lie
  bool dense;     // the projection's columns stand without gaps, and its sums are spread afterwards
  Index chunk;    // steps
  double own_share;  // of a chunk's products, where threads share steps: what the first thread makes of them
  double cycles;     // estimated
};

Plan plan_recurrence(const Recurrence& work, const Engine& engine, int threads);

// The recurrences of the contract's operations. Frozen weights are packed once, and for all calls to come.
Plan plan_forward(const LayerShape& shape, const Engine& engine, bool frozen = false);
Plan plan_backward(const LayerShape& shape, Index k1, Index k2, bool want_dx, const Engine& engine);

// Cache sizes of this machine, read once: a core's own, and the one that all cores share.
Index l1_cache_bytes();
Index l2_cache_bytes();
Index l3_cache_bytes();

}  // namespace rnnfast::cpu
