#include "peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace rnnfast::cpu {
namespace {

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// The best rate of several short trials; work(team) returns the amount one thread did.
template <class Work>
double best_rate(int threads, Work&& work) {
  double best = 0;
  for (int trial = 0; trial < 9; ++trial) {
    std::atomic<double> total{0};
    double seconds = 0;
    auto body = [&](Team& team) {
      work(team);  // wakes the thread, warms the cache
      team.barrier();
      const double begin = now();
      const double amount = work(team);
      team.barrier();
      if (team.rank == 0) seconds = now() - begin;
      for (double seen = total.load(); !total.compare_exchange_weak(seen, seen + amount);) {
      }
    };
    run_team(threads, body);
    best = std::max(best, total.load() / seconds);
  }
  return best;
}

}  // namespace

template <class Storage>
double fma_peak(int threads) {
  return best_rate(threads, [](Team&) { return kernels().of<Storage>().fma_loop(300000); });
}

template double fma_peak<float>(int threads);
template double fma_peak<double>(int threads);
template double fma_peak<BFloat16>(int threads);

double read_bandwidth(Index bytes, int threads) {
  const Index count = std::max<Index>(bytes / Index(sizeof(float)), 64);
  std::vector<std::vector<float>> arrays(threads, std::vector<float>(count, 1.0f));
  const Index passes = std::max<Index>(1, (Index{64} << 20) / (count * Index(sizeof(float))));
  std::atomic<float> kept{0};
  return best_rate(threads, [&](Team& team) {
    float total = 0;
    for (Index pass = 0; pass < passes; ++pass)
      total += kernels().f32.sum(count, arrays[team.rank].data());
    kept.store(total);  // so that the reads cannot be dropped
    return double(passes * count * Index(sizeof(float)));
  });
}

}  // namespace rnnfast::cpu
