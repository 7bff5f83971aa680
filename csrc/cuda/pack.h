// The kernels before the steps and after them.
#pragma once

#include "backward.h"
#include "weights.h"

namespace rnnfast::cuda {

// A tile has two gates of eight units, one after the other, and the next tile the other two.
RNNFAST_DEVICE Index paired_row(Index row) { return row / 32 * 32 + row % 8 * 4 + row % 32 / 8; }

// Weights in the order of the kernel, and what comes in at the first step, in rows like those of the exchange.
template <class Engine, class Step>
RNNFAST_KERNEL(block_threads)
pack(RNNFAST_ARGUMENT Arguments<Step> args, RNNFAST_ARGUMENT Index count) {
  using Real = typename Engine::Real;
  const int direction = block_index().z;
  const Step step{args.shape, args.layers[direction], args.carries[direction]};
  const Index at = Index(block_index().x) * block_threads + thread_index();
  const Index terms = step.terms();
  if (args.initial[direction] && at < initial_numbers(args)) {
    const Index row = at / args.tiling.exchange_stride, k = at % args.tiling.exchange_stride;
    const Real number = row < args.initial_rows && k < terms ? step.initial(row, k) : Real{};
    args.initial[direction][at] = number_of_bits<Real>(never_absent(number));
  }
  if (at >= count) return;
  const int lane = int(at % 32), plane = int(at / 32 % Engine::planes);
  const int k_steps = args.tiling.k_steps * block_warps;
  const Index tile = at / (32 * Engine::planes);
  const Index row = tile / k_steps * Engine::tile_rows, k = tile % k_steps * Engine::step;
  const Index rows = args.shape.H * step.sums;
  args.weights[direction][at] = Engine::pack(plane, lane, [&](int r, int n) {
    const Index of = args.paired ? paired_row(row + r) : row + r;
    return of < rows && k + n < terms ? step.weight(of, k + n) : Real{};
  });
}

// Adds up the gradients of the initial state, window after window.
template <class Real, int gates>
RNNFAST_KERNEL(block_threads)
add_starts(RNNFAST_ARGUMENT Arguments<Backward<Real, gates>> args) {
  using State = StateOf<Real>;
  const int direction = block_index().z;
  const RecurrenceBackward<Real, State>& layer = args.layers[direction];
  const typename Backward<Real, gates>::Carry& carry = args.carries[direction];
  const Truncation truncation{args.shape.T, args.shape.k1, args.shape.k2, layer.reverse};
  const Index count = args.shape.B * args.shape.H, windows = truncation.windows_to_start();
  const Index at = Index(block_index().x) * block_threads + thread_index();
  if (at >= count) return;
  State dh(0), dc(0);
  for (Index j = 0; j < windows; ++j) {
    dh += carry.starts[j * count + at];
    if (gates == 4) dc += carry.dc[j * count + at];
  }
  layer.dh0[at] = narrow<Real>(dh);
  if (gates == 4) layer.dc0[at] = dc;
}

}  // namespace rnnfast::cuda
