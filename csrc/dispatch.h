// From run-time values to template arguments: one idiom for all of them.
//
//   return with_rnn_cell(cell, [&](auto cell) { return recurrence<decltype(cell)>(...); });
#pragma once

#include "cell.h"
#include "rnnfast.h"

namespace rnnfast {

template <class Body>
static inline auto with_rnn_cell(Cell cell, Body&& body) {
  return cell == Cell::rnn_relu ? body(ReluCell{}) : body(TanhCell{});
}

}  // namespace rnnfast
