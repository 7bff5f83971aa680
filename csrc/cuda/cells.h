// The cells of one step, where somebody else has computed the product: the method gemm.
#pragma once

#include "backward.h"

namespace rnnfast::cuda {

// sums: (B, G*H) forward, as torch lays out h W_hh^T; (B, H) backward, da W_hh.
template <class Step>
struct CellsArguments {
  RecurrenceShape shape;
  typename Step::Layer layer;
  typename Step::Carry carry;
  const typename Step::State* sums;
  int p;
};

template <class Step>
RNNFAST_KERNEL(block_threads)
cells(RNNFAST_ARGUMENT CellsArguments<Step> args) {
  using State = typename Step::State;
  const Step step{args.shape, args.layer, args.carry};
  const Index at = Index(block_index().x) * block_threads + thread_index(), H = args.shape.H;
  if (at >= args.shape.B * H) return;
  const int b = int(at / H), unit = int(at % H);
  const typename Step::Column column = step.column(b);
  const CellPlace place = step.place(args.p, column, unit);
  const typename Step::Inputs inputs = step.template load<false>(args.p, column, unit, place);
  State sums[Step::sums];
  RNNFAST_UNROLL
  for (int sum = 0; sum < Step::sums; ++sum) sums[sum] = args.sums[(Index(b) * Step::sums + sum) * H + unit];
  State state = Step::has_state ? step.state_before(args.p, b, unit) : State(0);
  const typename Step::Outputs outputs = step.template compute<false>(args.p, column, inputs, sums, state);
  step.template store<false>(args.p, column, b, unit, place, outputs, state, true);
  step.finish(column, unit, outputs);  // the last step's stays
  if (Step::has_state) step.keep_state(b, unit, state);
}

}  // namespace rnnfast::cuda
