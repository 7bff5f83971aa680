// The rows of steps: in blocks, in chunks, and as one matrix.
//
// Of a step's rows those of running sequences exist, the first rows_at(t) of the batch, and they lie behind those
// of the step before it. So the rows of neighbouring steps are a matrix without gaps, whatever ends when.
#pragma once

#include "panels.h"
#include "workspace.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// Row `row` of a group of rows: of a step, or of a window of the truncation.
struct GroupRow {
  Index group, row;
};

// Calls body(count, rows) for all rows in range_of(group) of the groups, in order, in blocks that are about as large
// as one another and no larger than passes over the weights together.
template <class RangeOf, class Body>
RNNFAST_INLINE void for_each_block(Range groups, RangeOf&& range_of, Body&& body) {
  Index count = 0;
  for (Index group = groups.begin; group < groups.end; ++group) count += range_of(group).size();
  const Index blocks = ceil_div(count, row_block);
  Index group = groups.begin;
  Range own = count > 0 ? range_of(group) : Range{};
  for (Index block = 0; block < blocks; ++block) {
    GroupRow rows[row_block];
    const Index size = share(count, block, blocks).size();
    for (Index r = 0; r < size; ++r) {
      while (own.begin == own.end) own = range_of(++group);
      rows[r] = {group, own.begin++};
    }
    body(size, rows);
  }
}

// Asks for rows that other threads have just written, all lines at once. Their products would come upon line after line,
// and each takes its time from core to core.
template <class Element>
RNNFAST_INLINE void request_rows(Index count, const Element* const* rows, Index elements) {
  for (Index r = 0; r < count; ++r)
    for (Index k = 0; k < elements; k += Index(cache_line / sizeof(Element))) __builtin_prefetch(rows[r] + k);
}

// Those of `range` that are in `other`.
inline Range overlap(Range range, Range other) {
  const Index begin = std::max(range.begin, other.begin);
  return {begin, std::max(begin, std::min(range.end, other.end))};
}

// How many steps make a chunk of at most `most_rows`, one step at least: of `most_steps` with rows_at(0),
// rows_at(1), ... rows.
template <class RowsAt>
Index steps_within(Index most_rows, Index most_steps, RowsAt&& rows_at) {
  Index steps = 1, rows = rows_at(0);
  while (steps < most_steps && (rows += rows_at(steps)) <= most_rows) ++steps;
  return steps;
}

// Where the rows of steps p stand among those of all steps.
inline Range rows_of_steps(const LayerShape& shape, Range steps) {
  const Index one = shape.time(steps.begin), other = shape.time(steps.end - 1);
  return {shape.first_row(std::min(one, other)), shape.first_row(std::max(one, other) + 1)};
}

// An array of some rows: of all, or of the steps in work, whose places later ones take.
template <class Element>
struct RowRing {
  Element* rows;
  Index count, row_size;

  Element* at(Index row) const { return rows + row % count * row_size; }
};

// The h that each row of all steps was computed from: to[row], a row of y or of h0.
template <class Storage>
void find_previous(const LayerShape& shape, const Storage* y, const Storage* h0, const Storage** to) {
  for (Index t = 0; t < shape.T; ++t) {
    const Index t_prev = shape.before(t), carried = std::min(shape.rows_at(t_prev), shape.rows_at(t));
    const Storage* previous = carried > 0 ? y + shape.first_row(t_prev) * shape.h_size() : nullptr;
    for (Index b = 0; b < shape.rows_at(t); ++b) *to++ = (b < carried ? previous : h0) + b * shape.h_size();
  }
}

// What the weights were multiplied with in some rows.
template <class Storage>
struct StepInputs {
  const LayerBackward<Storage>& layer;
  const Storage* const* previous;  // as find_previous() gives it
  Range rows;

  const Storage* x(Index k) const { return layer.x + (rows.begin + k) * layer.shape.I; }
  const Storage* h_prev(Index k) const { return previous[rows.begin + k]; }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
