#include "team.h"

#include <omp.h>

#include <cfenv>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace rnnfast::cpu {
namespace {

void relax() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<bool> forked{false};

[[maybe_unused]] const bool watches_forks = [] {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif
  return true;
}();

}  // namespace

void Barrier::wait(int size) {
  const unsigned generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
    if (spin < 4000)
      relax();
    else
      std::this_thread::yield();
  }
}

void run_team(int threads, Task task, void* context) {
  Barrier barrier;
  if (threads <= 1 || forked.load(std::memory_order_relaxed)) {
    Team alone(0, 1, barrier);
    task(alone, context);
    return;
  }
  std::fenv_t callers_mode;
  std::fegetenv(&callers_mode);
#pragma omp parallel num_threads(threads)
  {
    std::fenv_t own_mode;
    std::fegetenv(&own_mode);
    std::fesetenv(&callers_mode);
    Team team(omp_get_thread_num(), omp_get_num_threads(), barrier);
    task(team, context);
    std::fesetenv(&own_mode);
  }
}

}  // namespace rnnfast::cpu
