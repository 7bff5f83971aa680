// What a kernel's arguments must be so that it cannot read or write out of bounds. Python has said it
// better by then; this is the second lock on the door, shared by every backend.
#pragma once

#include <limits>
#include <type_traits>

#include "rnnfast.h"

namespace rnnfast {

enum class Status { ok, bad_size, bad_offsets, missing_argument, bad_truncation, overlapping_windows };

inline const char* message(Status status) {
  switch (status) {
    case Status::bad_size: return "a size is negative, too large, or the thread count is below one";
    case Status::bad_offsets: return "steps must have from 1 to B rows, the first one B, and none more than the one before";
    case Status::missing_argument: return "an array that this operation needs is missing";
    case Status::bad_truncation: return "truncation must satisfy 1 <= k1 <= T and k1 <= k2 <= ceil(T / k1) * k1";
    case Status::overlapping_windows: return "windows of a projected layer must not overlap: k1 = k2";
    case Status::ok: break;
  }
  return "ok";
}

// Every array of the operation has fewer elements than this.
inline bool countable(const LayerShape& shape) {
  const double largest = double(std::numeric_limits<Index>::max()) / 64;
  const double widest = 4.0 * double(shape.H) + double(shape.I) + 64;
  return double(shape.T) * double(shape.B + 1) * widest < largest && widest * widest < largest;
}

inline Status check(const LayerShape& shape) {
  if (shape.T < 0 || shape.B < 0 || shape.I < 0 || shape.H < 1 || shape.threads < 1)
    return Status::bad_size;
  // A projection to more numbers than there are is nobody's; scratch of H numbers holds one of P.
  if (shape.projection < 0 || shape.projection > shape.H || (shape.projection > 0 && shape.cell != Cell::lstm))
    return Status::bad_size;
  if (!countable(shape)) return Status::bad_size;
  if (shape.offsets && shape.first_row(0) != 0) return Status::bad_offsets;
  for (Index t = 0; shape.offsets && t < shape.T; ++t)
    if (shape.rows_at(t) < 1 || shape.rows_at(t) > (t > 0 ? shape.rows_at(t - 1) : shape.B)) return Status::bad_offsets;
  return shape.rows_at(0) == shape.B || shape.T == 0 ? Status::ok : Status::bad_offsets;
}

template <class Storage>
Status check(const LayerForward<Storage>& layer) {
  const LayerShape& shape = layer.shape;
  if (const Status status = check(shape); status != Status::ok) return status;
  const bool lstm = shape.cell == Cell::lstm, empty = shape.T == 0 || shape.B == 0;
  if (!layer.w_hh || (!layer.w_ih && shape.I > 0)) return Status::missing_argument;
  if (empty) return Status::ok;
  if ((!layer.x && shape.I > 0) || !layer.h0 || !layer.y) return Status::missing_argument;
  if (lstm && (!layer.c0 || !layer.c_n)) return Status::missing_argument;
  return shape.projection > 0 && !layer.w_hr ? Status::missing_argument : Status::ok;
}

template <class Storage>
Status check(const LayerBackward<Storage>& layer) {
  const LayerShape& shape = layer.shape;
  if (const Status status = check(shape); status != Status::ok) return status;
  if (layer.k1 < 1 || layer.k1 > shape.T) return Status::bad_truncation;
  const Index blocks = (shape.T + layer.k1 - 1) / layer.k1;
  if (layer.k1 > layer.k2 || layer.k2 > blocks * layer.k1) return Status::bad_truncation;
  const bool lstm = shape.cell == Cell::lstm, empty = shape.B == 0;
  if (!layer.w_hh || (!layer.w_ih && shape.I > 0)) return Status::missing_argument;
  if (layer.db && !layer.dw_hh) return Status::missing_argument;
  if (empty) return Status::ok;
  if ((!layer.x && shape.I > 0) || !layer.h0 || !layer.y)
    return Status::missing_argument;
  if (lstm && (!layer.c0 || !layer.c)) return Status::missing_argument;
  if (shape.projection > 0) {
    if (!layer.w_hr || (layer.dw_hr && !layer.m)) return Status::missing_argument;
    if (layer.k2 > layer.k1) return Status::overlapping_windows;
  }
  if (layer.k1 < shape.T && !layer.da) return Status::missing_argument;
  if (layer.k2 > layer.k1) {
    constexpr bool rounds = !std::is_same_v<Storage, RealOf<Storage>>;
    if (!layer.da_windows || (rounds && !layer.da_sums)) return Status::missing_argument;
  }
  return Status::ok;
}

inline Status check(const RecurrenceShape& shape) {
  const LayerShape layer{shape.cell, shape.T, shape.B, 0, shape.H, false, 1};
  if (const Status status = check(layer); status != Status::ok) return status;
  if (shape.k1 < 1 || shape.k1 > shape.T || shape.k1 > shape.k2) return Status::bad_truncation;
  const Index blocks = (shape.T + shape.k1 - 1) / shape.k1;
  return shape.k2 > blocks * shape.k1 ? Status::bad_truncation : Status::ok;
}

template <class Real, class State>
Status check(const RecurrenceShape& shape, const RecurrenceForward<Real, State>& layer) {
  const bool lstm = shape.cell == Cell::lstm;
  if (!layer.a || !layer.w_hh || !layer.h0 || !layer.y || !layer.h_n) return Status::missing_argument;
  if (lstm && (!layer.c0 || !layer.c_n)) return Status::missing_argument;
  return Status::ok;
}

template <class Real, class State>
Status check(const RecurrenceShape& shape, const RecurrenceBackward<Real, State>& layer) {
  const bool lstm = shape.cell == Cell::lstm;
  if (!layer.w_hh || !layer.da || !layer.dh0) return Status::missing_argument;
  if (lstm && (!layer.c0 || !layer.c || !layer.gates || !layer.dc0)) return Status::missing_argument;
  if (!lstm && !layer.y) return Status::missing_argument;
  return Status::ok;
}

}  // namespace rnnfast
