// Every kernel against plain loops: for each instruction set of this processor, on arrays whose edges are
// guarded (array.h), called by three threads at once that share inputs and ask for 1, 2 and 5 threads.
//
// This is what the sanitizers run. Each call is made by a thread of its own, so its workspace is as large as
// the call needs and no larger, and a read past its end shows too.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "array.h"
#include "check.h"
#include "cpu/frozen.h"
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "openmp.h"
#include "plain.h"

namespace {

using rnnfast::Cell;
using rnnfast::Index;

std::atomic<int> failures{0};

void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED %s\n", what.c_str());
  ++failures;
}

struct Case {
  Cell cell;
  Index T, B, I, H;
  bool reverse = false;
  Index k1 = 0, k2 = 0;  // 0: not truncated
  bool lean = false;     // everything that may be absent is
  std::vector<Index> lengths = {};  // of packed sequences; none: all have T steps
  Index P = 0;                      // of a projected LSTM

  Index h_size() const { return P ? P : H; }

  // The first row of each step, and how many there are.
  std::vector<Index> offsets() const {
    std::vector<Index> first{0};
    for (Index t = 0; t < T; ++t) {
      first.push_back(first.back() + (lengths.empty() ? B : 0));
      for (const Index length : lengths) first.back() += t < length;
    }
    return first;
  }
  Index rows() const { return offsets().back(); }
  Index gate_rows() const { return rnnfast::gate_count(cell) * H; }
  bool lstm() const { return cell == Cell::lstm; }
  Index block() const { return k1 ? k1 : T; }
  Index window() const { return k1 ? k2 : T; }
  std::string name() const {
    const char* cells[] = {"lstm", "tanh", "relu"};
    std::string text = cells[int(cell)];
    for (Index size : {T, B, I, H}) text += " " + std::to_string(size);
    if (reverse) text += " reverse";
    if (k1) text += " k " + std::to_string(k1) + " " + std::to_string(k2);
    for (std::size_t b = 0; b < lengths.size(); ++b) text += (b ? "," : " packed ") + std::to_string(lengths[b]);
    if (P) text += " projected " + std::to_string(P);
    return lean ? text + " lean" : text;
  }
};

// Inputs of one case as the kernels read them, and what must come out. Pre-activations are of order one
// whatever the sizes, else saturated gates would hide mistakes behind derivatives of zero.
template <class Real>
struct Problem {
  Case shape;
  Array<Real> x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr, dy, dh_n, dc_n, dc;
  plain::Outputs outputs;
  plain::Gradients gradients;
  const rnnfast::cpu::Name name = rnnfast::cpu::freeze();  // of its weights, for calls that may trust them

  ~Problem() { rnnfast::cpu::thaw(name); }
  explicit Problem(const Case& shape) : shape(shape) {
    const Index T = shape.T, B = shape.B, I = shape.I, H = shape.H, GH = shape.gate_rows(), N = shape.rows();
    const Index state = shape.lstm() ? B * H : 0, P = shape.h_size();
    plain::Layer layer{shape.cell, T, B, I, H, shape.reverse, {}, {}, {}, {}, {}, {}, {}, shape.lengths, shape.P};
    plain::Cotangents up;
    const double bound = 1 / std::sqrt(double(H));
    fill(x, layer.x, N * I, std::sqrt(3.0 * double(H) / double(std::max<Index>(I, 1))));
    fill(w_ih, layer.w_ih, GH * I, bound);
    fill(w_hh, layer.w_hh, GH * P, bound * std::sqrt(double(H) / double(P)));
    fill(w_hr, layer.w_hr, shape.P * H, 2 * bound);
    fill(b_ih, layer.b_ih, GH, shape.lean ? 0 : 1);
    fill(b_hh, layer.b_hh, GH, shape.lean ? 0 : 1);
    fill(h0, layer.h0, B * P, 1);
    fill(c0, layer.c0, state, 2);
    fill(dy, up.dy, N * P, 2);
    fill(dh_n, up.dh_n, B * P, shape.lean ? 0 : 2);
    fill(dc_n, up.dc_n, state, shape.lean ? 0 : 2);
    fill(dc, up.dc, shape.lstm() ? N * H : 0, shape.lean ? 0 : 2);
    outputs = plain::forward(layer);
    gradients = plain::backward(layer, outputs, up, shape.block(), shape.window());
  }

 private:
  std::mt19937_64 random_{1};

  void fill(Array<Real>& array, plain::Values& values, Index count, double bound) {
    array = Array<Real>(count);
    std::uniform_real_distribution<double> uniform(-bound, bound);
    for (Real& element : array) element = bound == 0 ? Real(0) : Real(uniform(random_));
    values.assign(array.begin(), array.end());
  }
};

// What one call of the kernels wrote.
template <class Real>
struct Results {
  Array<Real> y, h_n, c_n, c, gates, m, y_lean, y_frozen, dx, dw_ih, dw_hh, db, dh0, dc0, dw_hr, dw_hh_recomputed;
};

template <class Real>
Results<Real> run(const Problem<Real>& problem, int threads) {
  const Case& shape = problem.shape;
  const Index T = shape.T, B = shape.B, I = shape.I, H = shape.H, GH = shape.gate_rows(), N = shape.rows();
  const Index state = shape.lstm() ? B * H : 0, states = shape.lstm() ? N * H : 0, P = shape.h_size();
  const std::vector<Index> offsets = shape.offsets();
  const bool lean = shape.lean;
  const auto optional = [&](const Array<Real>& array) { return lean ? nullptr : array.data(); };
  const auto lstm_only = [&](auto& array) { return shape.lstm() ? array.data() : nullptr; };

  Results<Real> out;
  for (Array<Real>* array : {&out.y, &out.y_lean, &out.y_frozen}) *array = Array<Real>(N * P);
  out.h_n = Array<Real>(B * P);
  out.m = Array<Real>(shape.P ? N * H : 0);
  out.c_n = Array<Real>(state);
  out.c = Array<Real>(states);
  out.gates = Array<Real>(4 * states);
  rnnfast::LayerForward<Real> forward{};
  forward.shape = {shape.cell, T, B, I, H, shape.reverse, threads};
  if (!shape.lengths.empty()) forward.shape.offsets = offsets.data();
  forward.shape.projection = shape.P;
  forward.w_hr = shape.P ? problem.w_hr.data() : nullptr;
  forward.x = problem.x.data();
  forward.w_ih = problem.w_ih.data();
  forward.w_hh = problem.w_hh.data();
  forward.b_ih = optional(problem.b_ih);
  forward.b_hh = optional(problem.b_hh);
  forward.h0 = problem.h0.data();
  forward.c0 = lstm_only(problem.c0);
  forward.c_n = lstm_only(out.c_n);
  const auto call_forward = [&] {
    if (check(forward) != rnnfast::Status::ok) fail(shape.name() + ": refused by check");
    rnnfast::cpu::kernels().of<Real>().forward(forward);
  };
  forward.y = out.y_lean.data();  // nothing kept for a backward pass, and no h_n
  call_forward();
  forward.y = out.y_frozen.data();
  forward.frozen = problem.name;
  call_forward();  // which may find no copy of the weights yet
  call_forward();
  forward.frozen = 0;
  forward.y = out.y.data();
  forward.h_n = out.h_n.data();
  forward.c = lstm_only(out.c);
  forward.gates = lstm_only(out.gates);
  forward.m = shape.P ? out.m.data() : nullptr;
  call_forward();

  out.dx = Array<Real>(lean ? 0 : N * I);
  out.dw_ih = Array<Real>(GH * I);
  out.dw_hh = Array<Real>(GH * P);
  out.dw_hr = Array<Real>(shape.P * H);
  out.db = Array<Real>(GH);
  out.dh0 = Array<Real>(lean ? 0 : B * P);
  out.dc0 = Array<Real>(lean ? 0 : state);
  Array<Real> da(shape.block() < T ? N * GH : 0), da_windows;
  const Index blocks = (T + shape.block() - 1) / shape.block();
  if (shape.window() > shape.block()) da_windows = Array<Real>(2 * blocks * B * GH);
  rnnfast::LayerBackward<Real> backward{};
  backward.shape = forward.shape;
  backward.k1 = shape.block();
  backward.k2 = shape.window();
  backward.dy = problem.dy.data();
  backward.dh_n = optional(problem.dh_n);
  backward.dc_n = shape.lstm() ? optional(problem.dc_n) : nullptr;
  backward.dc = shape.lstm() ? optional(problem.dc) : nullptr;
  backward.x = problem.x.data();
  backward.w_ih = problem.w_ih.data();
  backward.w_hh = problem.w_hh.data();
  backward.b_ih = forward.b_ih;
  backward.b_hh = forward.b_hh;
  backward.h0 = problem.h0.data();
  backward.c0 = forward.c0;
  backward.y = out.y.data();
  backward.c = forward.c;
  backward.gates = forward.gates;
  backward.w_hr = forward.w_hr;
  backward.m = forward.m;
  backward.dw_hr = shape.P ? out.dw_hr.data() : nullptr;
  backward.dx = lean ? nullptr : out.dx.data();
  backward.dw_ih = out.dw_ih.data();
  backward.dw_hh = out.dw_hh.data();
  backward.db = out.db.data();
  backward.dh0 = lean ? nullptr : out.dh0.data();
  backward.dc0 = lean ? nullptr : lstm_only(out.dc0);
  backward.da = shape.block() < T ? da.data() : nullptr;
  backward.da_windows = da_windows.data();
  const auto call_backward = [&] {
    if (check(backward) != rnnfast::Status::ok) fail(shape.name() + ": refused by check");
    rnnfast::cpu::kernels().of<Real>().backward(backward);
  };
  out.dw_hh_recomputed = Array<Real>(GH * P);
  backward.dw_hh = out.dw_hh_recomputed.data();  // of gates that were not kept
  backward.gates = nullptr;
  call_backward();
  backward.dw_hh = out.dw_hh.data();
  backward.gates = forward.gates;
  call_backward();
  return out;
}

double largest(const plain::Values& values) {
  double most = 0;
  for (double value : values) most = std::max(most, std::abs(value));
  return most;
}

// The bound of tests/tolerance.py, which says where it comes from: rounding errors of T steps over sums of
// K terms, relative to the largest magnitude of the expected array or, for gradients, of all of them.
template <class Real>
void expect_close(const std::string& what, const Array<Real>& got, const plain::Values& want, Index K,
                  Index T, double scale = 0) {
  const double allowed = 2.0 * std::numeric_limits<Real>::epsilon() *
                         std::sqrt(double(K + 16) * double(std::max<Index>(T, 1))) *
                         std::max(largest(want), scale);
  for (Index n = 0; n < got.size(); ++n) {
    const double error = std::abs(double(got[n]) - want[std::size_t(n)]);
    if (error <= allowed) continue;  // NaN is not
    return fail(what + "[" + std::to_string(n) + "]: off by " + std::to_string(error / allowed) +
                " times what rounding explains");
  }
}

template <class Real>
void expect_results(const std::string& name, const Problem<Real>& problem, const Results<Real>& got) {
  const Case& shape = problem.shape;
  const plain::Outputs& out = problem.outputs;
  const plain::Gradients& grad = problem.gradients;
  const Index forward = shape.I + shape.h_size() + (shape.P ? shape.H : 0);
  const auto output = [&](const char* what, const Array<Real>& array, const plain::Values& want) {
    expect_close(name + ": " + what, array, want, forward, shape.T);
  };
  output("y", got.y, out.y);
  output("y, nothing kept", got.y_lean, out.y);
  output("y, frozen weights", got.y_frozen, out.y);
  output("h_n", got.h_n, out.h_n);
  output("c_n", got.c_n, out.c_n);
  output("c", got.c, out.c);
  output("gates", got.gates, out.gates);
  output("m", got.m, out.m);
  const Index backward = forward + shape.gate_rows() + shape.T * shape.B;
  double scale = 2;  // the cotangents
  for (const plain::Values* values :
       {&grad.dx, &grad.dw_ih, &grad.dw_hh, &grad.db, &grad.dh0, &grad.dc0, &grad.dw_hr})
    scale = std::max(scale, largest(*values));
  const auto gradient = [&](const char* what, const Array<Real>& array, const plain::Values& want) {
    expect_close(name + ": " + what, array, want, backward, shape.T, scale);
  };
  gradient("dx", got.dx, grad.dx);
  gradient("dw_ih", got.dw_ih, grad.dw_ih);
  gradient("dw_hh", got.dw_hh, grad.dw_hh);
  gradient("dw_hh, gates computed again", got.dw_hh_recomputed, grad.dw_hh);
  gradient("db", got.db, grad.db);
  gradient("dh0", got.dh0, grad.dh0);
  gradient("dc0", got.dc0, grad.dc0);
  gradient("dw_hr", got.dw_hr, grad.dw_hr);
}

template <class Real>
void expect_same(const std::string& name, const Results<Real>& a, const Results<Real>& b) {
  const auto same = [&](const char* what, const Array<Real>& one, const Array<Real>& other) {
    if (std::memcmp(one.data(), other.data(), sizeof(Real) * std::size_t(one.size())) != 0)
      fail(name + ": " + what + " depends on the number of threads");
  };
  same("y", a.y, b.y);
  same("h_n", a.h_n, b.h_n);
  same("c_n", a.c_n, b.c_n);
  same("c", a.c, b.c);
  same("gates", a.gates, b.gates);
  same("y, nothing kept", a.y_lean, b.y_lean);
  same("y, frozen weights", a.y_frozen, b.y_frozen);
  same("dx", a.dx, b.dx);
  same("dw_ih", a.dw_ih, b.dw_ih);
  same("dw_hh", a.dw_hh, b.dw_hh);
  same("dw_hh, gates computed again", a.dw_hh, b.dw_hh_recomputed);
  same("db", a.db, b.db);
  same("dh0", a.dh0, b.dh0);
  same("dc0", a.dc0, b.dc0);
  same("m", a.m, b.m);
  same("dw_hr", a.dw_hr, b.dw_hr);
}

constexpr int thread_counts[] = {1, 2, 5};

template <class Real>
void test_layer(const Case& shape) {
  const Problem<Real> problem(shape);
  for (const std::string& isa : rnnfast::cpu::available_isas()) {
    rnnfast::cpu::use_isa(isa);
    Results<Real> results[3];
    std::vector<std::thread> callers;
    for (int n = 0; n < 3; ++n)
      callers.emplace_back([&, n] { results[n] = run(problem, thread_counts[n]); });
    for (std::thread& caller : callers) caller.join();
    const std::string name = isa + (sizeof(Real) == 4 ? " float " : " double ") + shape.name();
    expect_results(name, problem, results[0]);
    for (int n = 1; n < 3; ++n) expect_same(name, results[0], results[n]);
  }
}

std::vector<Case> cases() {
  std::vector<Case> list;
  constexpr Index sizes[][4] = {{1, 1, 1, 1},    {1, 3, 2, 17},   {3, 7, 5, 3},   {5, 3, 17, 16},
                                {3, 2, 65, 33},  {2, 130, 3, 5},  {4, 5, 0, 7},   {2, 0, 3, 4},
                                {30, 1, 20, 65}, {14, 9, 31, 40}, {7, 33, 16, 31}};
  int n = 0;  // options go round, so that each meets many sizes
  for (const auto& [T, B, I, H] : sizes) {
    for (Cell cell : {Cell::lstm, Cell::rnn_tanh, Cell::rnn_relu}) {
      const Index blocks = (T + 1) / 2;
      const Index truncations[][2] = {{0, 0}, {1, 1}, {std::min<Index>(2, T), std::min<Index>(3, T)},
                                      {0, 0}, {std::min<Index>(2, T), T > 1 ? 2 * blocks : 1}};
      const auto& [k1, k2] = truncations[n % 5];
      list.push_back({cell, T, B, I, H, n % 2 == 1, k1, k2, n % 3 == 2});
      ++n;
    }
  }
  // Packed sequences: all of one length, one that outlives all others, blocks of rows that end within a block.
  std::vector<Index> falling;
  for (Index b = 0; b < 150; ++b) falling.push_back(1 + (149 - b) / 25);
  const std::vector<std::vector<Index>> packs = {{1}, {3, 3}, {7, 2, 2, 1}, {9, 8, 5, 5, 5, 1}, {40, 3, 3, 2, 1}, falling};
  for (const std::vector<Index>& lengths : packs) {
    for (Cell cell : {Cell::lstm, Cell::rnn_tanh, Cell::rnn_relu}) {
      for (bool reverse : {false, true}) {
        const Index T = lengths[0], B = Index(lengths.size()), blocks = (T + 1) / 2;
        const Index truncations[][2] = {{0, 0}, {std::min<Index>(2, T), std::min<Index>(2, T)}, {0, 0}, {1, 1},
                                        {std::min<Index>(2, T), std::min<Index>(3, 2 * blocks)}};
        const auto& [k1, k2] = truncations[n % 5];
        list.push_back({cell, T, B, 5, n % 2 ? 19 : 33, reverse, k1, T > 1 ? k2 : k1, n % 3 == 2, lengths});
        ++n;
      }
    }
  }
  // Projected: to one number and to all, few uses of a weight and many, several blocks of rows and of terms.
  constexpr Index projections[][5] = {{1, 1, 1, 3, 1},    {1, 3, 2, 17, 4},   {3, 7, 5, 3, 2},   {5, 3, 17, 16, 16},
                                      {3, 2, 65, 33, 17}, {2, 130, 3, 20, 5}, {2, 0, 3, 4, 2},   {30, 1, 20, 65, 33},
                                      {14, 9, 31, 40, 9}, {7, 5, 4, 300, 40}, {40, 1, 24, 150, 150}};
  for (const auto& [T, B, I, H, P] : projections) {
    for (bool reverse : {false, true}) {
      const Index k = n % 3 == 1 ? std::min<Index>(T, 2) : 0;
      list.push_back({Cell::lstm, T, B, I, H, reverse, k, k, n % 4 == 3, {}, P});
      ++n;
    }
  }
  for (bool reverse : {false, true})
    list.push_back({Cell::lstm, 9, 6, 5, 33, reverse, 0, 0, false, {9, 8, 5, 5, 5, 1}, 19});
  // Long enough for threads to pay, one row only: threads can but share the hidden units.
  for (Cell cell : {Cell::lstm, Cell::rnn_tanh}) list.push_back({cell, 40, 1, 24, 150});
  // Nearly all is projection: they share that, by steps of several chunks; packed, too.
  for (Cell cell : {Cell::lstm, Cell::rnn_relu}) {
    list.push_back({cell, 130, 1, 300, 20});
    list.push_back({cell, 110, 2, 300, 20, true, 0, 0, false, {110, 15}});
  }
  return list;
}

// evaluate and sum, over every length up to a few vectors.
template <class Real>
void test_arrays() {
  using rnnfast::cpu::Function;
  for (const std::string& isa : rnnfast::cpu::available_isas()) {
    rnnfast::cpu::use_isa(isa);
    for (Index count = 0; count < 70; ++count) {
      Array<Real> x(count);
      plain::Values exp(count), tanh(count), sigmoid(count), sum(1);
      for (Index n = 0; n < count; ++n) {
        x[n] = Real(n - 35) / 8;
        exp[n] = std::exp(double(x[n]));
        tanh[n] = std::tanh(double(x[n]));
        sigmoid[n] = plain::sigmoid(x[n]);
        sum[0] += x[n];
      }
      const auto expect = [&](Function function, const char* what, const plain::Values& want) {
        Array<Real> y(count);
        rnnfast::cpu::kernels().of<Real>().evaluate(function, count, x.data(), y.data());
        expect_close(isa + " " + what, y, want, 1, 1);
      };
      expect(Function::exp, "exp", exp);
      expect(Function::tanh, "tanh", tanh);
      expect(Function::sigmoid, "sigmoid", sigmoid);
      Array<Real> total(1);
      total[0] = rnnfast::cpu::kernels().of<Real>().sum(count, x.data());
      expect_close(isa + " sum", total, sum, count, 1, 35.0 / 8 * double(count));
    }
  }
}

// Each thread reads what its neighbour wrote before the barrier, over and over; in teams that grow and shrink.
void test_barrier() {
  for (int threads : {3, 2, 5, 2, 4, 5, 6}) {
    constexpr int rounds = 500;
    std::vector<int> written(std::size_t(2 * threads), 0);
    std::vector<int> wrong(std::size_t(threads), 0);
    auto body = [&](rnnfast::cpu::Team& team) {
      for (int round = 1; round <= rounds; ++round) {
        int* slots = written.data() + round % 2 * team.size;
        slots[team.rank] = round;
        team.barrier();
        wrong[std::size_t(team.rank)] += slots[(team.rank + 1) % team.size] != round;
      }
    };
    rnnfast::cpu::run_team(threads, body);
    for (int count : wrong)
      if (count) fail("barrier of " + std::to_string(threads) + " let a thread pass too early");
  }
}

// The first use of the kernels in the process, by several threads at once.
void test_first_use() {
  const rnnfast::cpu::Kernels* chosen[4];
  std::vector<std::thread> callers;
  for (auto& choice : chosen) callers.emplace_back([&] { choice = &rnnfast::cpu::kernels(); });
  for (std::thread& caller : callers) caller.join();
  for (const auto* choice : chosen)
    if (choice != chosen[0]) fail("threads chose different instruction sets");
}

}  // namespace

int main() {
  test_first_use();
  test_barrier();
  test_arrays<float>();
  test_arrays<double>();
  int count = 0;
  for (const Case& shape : cases()) {
    const int before = regions_with_several_threads();
    test_layer<float>(shape);
    test_layer<double>(shape);
    ++count;
    // Else the threads' part of the kernels would go untested in silence.
    if (shape.B == 1 && shape.T >= 40 && regions_with_several_threads() == before)
      fail(shape.name() + ": no call used a second thread");
  }
  std::string isas;
  for (const std::string& isa : rnnfast::cpu::available_isas()) isas += " " + isa;
  std::printf("%d cases, float and double, by%s: %d failures; %d calls ran on several threads\n", count,
              isas.c_str(), failures.load(), regions_with_several_threads());
  return failures ? 1 : 0;
}
