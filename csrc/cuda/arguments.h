// What a kernel gets for one recurrence: the same for packing, for the steps and for what comes after them.
#pragma once

#include "exchange.h"
#include "plan.h"

namespace rnnfast::cuda {

template <class Step>
struct Arguments {
  using Real = typename Step::Real;
  RecurrenceShape shape;
  Tiling tiling;
  SharedLayout shared;
  typename Step::Layer layers[2];  // one for each direction
  typename Step::Carry carries[2];
  uint4* weights[2];   // packed
  Real* exchange[2];   // (rows, exchange_stride): what goes round in global memory, null where it doesn't
  Real* initial[2];    // (initial_rows, exchange_stride): what comes in at the first step; then tiling.zeros zeros
  int initial_rows;
  int begin, end;      // steps of this launch
  int blocks;          // of a group
  bool may_be_early;   // who reads a vector has to wait until it is there
  bool paired;         // the rows of weights are in resident.h's order
  bool apart;          // the exchange is no output, which is written besides
  bool from_memory;    // what cells read is too much for L2 to have it still
};

template <class Step>
RNNFAST_ANYWHERE Index initial_numbers(const Arguments<Step>& args) {
  return args.initial_rows * Index(args.tiling.exchange_stride) + args.tiling.zeros;
}

}  // namespace rnnfast::cuda
