// Times one call of two versions of the kernels, in blocks whose order is drawn anew each round; prints the
// medians of both in milliseconds, the median of the rounds' ratios, and the largest difference of results.
//
//   compare LSTM|RNN T B I H forward|backward|training threads rounds
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace rnnfast::cpu {
extern const Kernels kernels_after;
}
namespace rnnfast_before::cpu {
extern const rnnfast::cpu::Kernels kernels_before;  // forward and backward stand first in every version's
}

using namespace rnnfast;

namespace {

// As torch aligns its arrays; otherwise threads that write neighbouring units would share cache lines.
template <class Element>
struct OnCacheLines {
  using value_type = Element;
  static constexpr std::align_val_t line{64};
  OnCacheLines() = default;
  template <class Other>
  OnCacheLines(const OnCacheLines<Other>&) {}
  Element* allocate(std::size_t count) { return static_cast<Element*>(::operator new(count * sizeof(Element), line)); }
  void deallocate(Element* first, std::size_t) { ::operator delete(first, line); }
  bool operator==(const OnCacheLines&) const { return true; }
  bool operator!=(const OnCacheLines&) const { return false; }
};
using Array = std::vector<float, OnCacheLines<float>>;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Array uniform(Index count, double bound) {
  static std::mt19937 random(1);
  std::uniform_real_distribution<float> draw(float(-bound), float(bound));
  Array values(count);
  for (float& value : values) value = draw(random);
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 9) {
    std::fprintf(stderr, "usage: compare LSTM|RNN T B I H forward|backward|training threads rounds\n");
    return 2;
  }
  const bool lstm = argv[1] == std::string("LSTM");
  const Index T = std::atoll(argv[2]), B = std::atoll(argv[3]), I = std::atoll(argv[4]), H = std::atoll(argv[5]);
  const std::string mode = argv[6];
  const int threads = std::atoi(argv[7]), rounds = std::atoi(argv[8]);
  const Cell cell = lstm ? Cell::lstm : Cell::rnn_tanh;
  const Index rows = gate_count(cell) * H, steps = T * B;

  const double bound = 1 / std::sqrt(double(H));
  const Array x = uniform(steps * I, 1), w_ih = uniform(rows * I, bound), w_hh = uniform(rows * H, bound);
  const Array b_ih = uniform(rows, bound), b_hh = uniform(rows, bound);
  const Array h0 = uniform(B * H, 1), c0 = uniform(B * H, 1), dy = uniform(steps * H, 1);
  Array y(steps * H), h_n(B * H), c_n(B * H), c(steps * H), gates(steps * rows);
  Array dx(steps * I), dw_ih(rows * I), dw_hh(rows * H), db(rows), dh0(B * H), dc0(B * H);
  const auto of_lstm = [&](auto* values) { return lstm ? values : nullptr; };

  const bool keeps = mode != "forward";
  LayerForward<float> forward{};
  forward.shape = {cell, T, B, I, H, false, threads};
  forward.x = x.data(), forward.w_ih = w_ih.data(), forward.w_hh = w_hh.data();
  forward.b_ih = b_ih.data(), forward.b_hh = b_hh.data();
  forward.h0 = h0.data(), forward.c0 = of_lstm(c0.data());
  forward.y = y.data(), forward.h_n = h_n.data(), forward.c_n = of_lstm(c_n.data());
  if (keeps) forward.c = of_lstm(c.data()), forward.gates = of_lstm(gates.data());
  LayerBackward<float> backward{};
  backward.shape = forward.shape;
  backward.k1 = backward.k2 = T;
  backward.dy = dy.data(), backward.x = x.data(), backward.w_ih = w_ih.data(), backward.w_hh = w_hh.data();
  backward.h0 = h0.data(), backward.c0 = of_lstm(c0.data()), backward.y = y.data();
  backward.c = of_lstm(c.data()), backward.gates = of_lstm(gates.data());
  backward.dx = dx.data(), backward.dw_ih = dw_ih.data(), backward.dw_hh = dw_hh.data(), backward.db = db.data();
  backward.dh0 = dh0.data(), backward.dc0 = of_lstm(dc0.data());

  const auto run = [&](bool after) {
    const auto& kernels = (after ? cpu::kernels_after : rnnfast_before::cpu::kernels_before).f32;
    if (mode != "backward") kernels.forward(forward);
    if (keeps) kernels.backward(backward);
  };
  cpu::kernels_after.f32.forward(forward);  // what a backward pass alone reads
  Array results[2];
  for (const bool after : {false, true}) {
    run(after);
    results[after] = keeps ? dw_hh : y;
  }
  double difference = 0;
  for (std::size_t n = 0; n < results[0].size(); ++n)
    difference = std::max(difference, double(std::abs(results[0][n] - results[1][n])));

  std::mt19937 random(2);
  std::vector<double> blocks[2], ratios;
  for (int round = 0; round < rounds; ++round) {
    double seconds[2];
    const bool first = random() & 1;
    for (const bool after : {first, !first}) {
      std::this_thread::sleep_for(std::chrono::milliseconds(15));
      run(after);  // untimed: wakes the threads, fills the caches
      std::vector<double> calls;
      const double begin = now();
      do {
        const double start = now();
        run(after);
        calls.push_back(now() - start);
      } while (now() - begin < 0.020);
      seconds[after] = median(calls);
      blocks[after].push_back(seconds[after]);
    }
    ratios.push_back(seconds[0] / seconds[1]);
  }
  std::printf("%.6f %.6f %.4f %.3g\n", 1e3 * median(blocks[0]), 1e3 * median(blocks[1]), median(ratios), difference);
}
