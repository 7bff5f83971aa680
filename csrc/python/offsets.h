// Where the steps of packed sequences begin, from the numbers of their rows.
#pragma once

#include <cstdint>
#include <vector>

#include "../rnnfast.h"

namespace rnnfast::python {

// LayerShape's offsets of T steps, from the address of a PackedSequence's batch_sizes; none where that is null, or
// there are no steps.
inline std::vector<Index> offsets_of(std::uintptr_t batch_sizes, Index T) {
  if (!batch_sizes || T < 1) return {};
  const auto* rows = reinterpret_cast<const std::int64_t*>(batch_sizes);
  std::vector<Index> offsets{0};
  for (Index t = 0; t < T; ++t) offsets.push_back(offsets.back() + rows[t]);
  return offsets;
}

}  // namespace rnnfast::python
