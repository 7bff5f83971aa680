// One call of one kernel, for a tool that counts instructions (benchmarks/counts.py).
//
//   counted CELL T B I H MODE     CELL: lstm, tanh, relu; MODE: forward, training
//   counted --compiler            what built this
//
// Only what `measured` does is to be counted: the kernel, on one thread, the second time, when the workspace
// is there. Values do not matter as long as they are ordinary numbers: the kernels do not branch on them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu/kernels.h"

using rnnfast::Cell;
using rnnfast::Index;

extern "C" __attribute__((noinline)) void measured(const std::function<void()>& call) { call(); }

namespace {

using Values = std::vector<float>;

Values numbers(Index count) {
  Values values(static_cast<std::size_t>(count));
  for (std::size_t n = 0; n < values.size(); ++n) values[n] = float(n * 7 % 31) / 256 - 0.05f;
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "--compiler")) return std::puts(RNNFAST_COMPILER) < 0;
  if (argc != 7) return std::fputs("usage: counted CELL T B I H MODE\n", stderr), 2;
  const Cell cell = !std::strcmp(argv[1], "lstm")   ? Cell::lstm
                    : !std::strcmp(argv[1], "tanh") ? Cell::rnn_tanh
                                                    : Cell::rnn_relu;
  const Index T = std::atol(argv[2]), B = std::atol(argv[3]);
  const Index I = std::atol(argv[4]), H = std::atol(argv[5]);
  const bool training = !std::strcmp(argv[6], "training"), lstm = cell == Cell::lstm;
  const Index GH = rnnfast::gate_count(cell) * H, rows = T * B;

  const Values x = numbers(rows * I), w_ih = numbers(GH * I), w_hh = numbers(GH * H), bias = numbers(GH),
               h0 = numbers(B * H), c0 = numbers(B * H), dy = numbers(rows * H);
  Values y(rows * H), h_n(B * H), c_n(B * H), c(rows * H), gates(rows * 4 * H), dx(rows * I), dw_ih(GH * I),
      dw_hh(GH * H), db(GH), dh0(B * H), dc0(B * H);

  rnnfast::LayerForward<float> forward{};
  forward.shape = {cell, T, B, I, H, false, 1};
  forward.x = x.data();
  forward.w_ih = w_ih.data();
  forward.w_hh = w_hh.data();
  forward.b_ih = forward.b_hh = bias.data();
  forward.h0 = h0.data();
  forward.y = y.data();
  forward.h_n = h_n.data();
  if (lstm) {
    forward.c0 = c0.data();
    forward.c_n = c_n.data();
  }
  if (lstm && training) {
    forward.c = c.data();
    forward.gates = gates.data();
  }

  rnnfast::LayerBackward<float> backward{};
  backward.shape = forward.shape;
  backward.k1 = backward.k2 = T;
  backward.dy = dy.data();
  backward.x = forward.x;
  backward.w_ih = forward.w_ih;
  backward.w_hh = forward.w_hh;
  backward.h0 = forward.h0;
  backward.c0 = forward.c0;
  backward.y = forward.y;
  backward.c = forward.c;
  backward.gates = forward.gates;
  backward.dx = dx.data();
  backward.dw_ih = dw_ih.data();
  backward.dw_hh = dw_hh.data();
  backward.db = db.data();
  backward.dh0 = dh0.data();
  backward.dc0 = lstm ? dc0.data() : nullptr;

  const auto& kernels = rnnfast::cpu::kernels().f32;
  const auto call = [&] {
    kernels.forward(forward);
    if (training) kernels.backward(backward);
  };
  call();
  measured(call);
  return 0;
}
