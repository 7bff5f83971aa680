// What a thread owns of a recurrence: rows, or hidden units of all rows.
#pragma once

#include "../truncation.h"
#include "panels.h"
#include "plan.h"

namespace rnnfast::cpu::RNNFAST_ISA {

struct Part {
  Range rows;          // batch rows
  Range unit_vectors;  // vectors of hidden units
};

inline Part part_of(const Team& team, const Plan& plan, Index rows, Index unit_vectors) {
  return {plan.split == Split::rows ? team.share(rows) : Range{0, rows},
          plan.split == Split::units ? team.share(unit_vectors) : Range{0, unit_vectors}};
}

// The same where rows differ in the steps they run for: work_of(n) is that of the first n rows.
template <class WorkOf>
Part part_of(const Team& team, const Plan& plan, Index rows, Index unit_vectors, WorkOf&& work_of) {
  Part part = part_of(team, plan, rows, unit_vectors);
  if (plan.split != Split::rows) return part;
  const Index work = work_of(rows);
  const auto border = [&](Index rank) {
    Index low = 0, high = rows;  // the most rows with no more than their share
    while (low < high) {
      const Index middle = high - (high - low) / 2;
      if (work_of(middle) * team.size <= work * rank)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  };
  part.rows = {border(team.rank), team.rank + 1 < team.size ? border(team.rank + 1) : rows};
  return part;
}

// Of a layer forward: a row is as much work as its sequence has steps.
template <class Storage>
Part part_of(const Team& team, const Plan& plan, const LayerForward<Storage>& layer, Index unit_vectors) {
  const LayerShape& shape = layer.shape;
  if (!shape.offsets) return part_of(team, plan, shape.B, unit_vectors);
  return part_of(team, plan, shape.B, unit_vectors, [&](Index rows) {
    Index work = 0;
    for (Index t = 0; t < shape.T; ++t) work += std::min(rows, shape.rows_at(t));
    return work;
  });
}

// Of a layer backward, whose row n is batch row n % B of window n / B: as much as it has steps within its window.
template <class Storage>
Part part_of(const Team& team, const Plan& plan, const LayerBackward<Storage>& layer, const Truncation& truncation,
             Index unit_vectors) {
  const LayerShape& shape = layer.shape;
  const Index B = shape.B, rows = truncation.blocks() * B;
  if (!shape.offsets) return part_of(team, plan, rows, unit_vectors);
  return part_of(team, plan, rows, unit_vectors, [&](Index first_rows) {
    Index work = 0;
    for (Index j = 0; j * B < first_rows; ++j)
      for (Index p = std::max<Index>(truncation.window_begin(j), 0); p < truncation.block_end(j); ++p)
        work += std::min(first_rows - j * B, shape.rows_at(shape.time(p)));
    return work;
  });
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
