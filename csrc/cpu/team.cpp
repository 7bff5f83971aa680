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

Barrier& Barrier::with_room(int members) {
  static thread_local Barrier barrier;
  if (barrier.room_ < members) {
    barrier.places_.reset(new Place[static_cast<std::size_t>(members)]);
    barrier.room_ = members;
    for (int rank = 0; rank < members; ++rank) barrier.places_[rank].count = barrier.passed;
  }
  return barrier;
}

void Barrier::wait(int rank, int size, Count count) {
  places_[rank].count.store(count, std::memory_order_release);
  int spin = 0;
  for (int other = 0; other < size; ++other) {
    while (places_[other].count.load(std::memory_order_acquire) < count) {
      if (++spin < 4000)
        relax();
      else
        std::this_thread::yield();
    }
  }
}

void Team::barrier() {
  if (size > 1) barrier_->wait(rank, size, ++passed_);
}

void run_team(int threads, Task task, void* context) {
  if (threads <= 1 || forked.load(std::memory_order_relaxed)) {
    Team alone(0, 1, nullptr, 0);
    task(alone, context);
    return;
  }
  std::fenv_t callers_mode;
  std::fegetenv(&callers_mode);
  Barrier* barrier = &Barrier::with_room(threads);
  Barrier::Count passed = barrier->passed;
  // Private: handed over in one piece, rather than each where the caller keeps it, which other cores would ask for one
  // after the other.
#pragma omp parallel num_threads(threads) firstprivate(task, context, callers_mode, barrier, passed)
  {
    std::fenv_t own_mode;
    std::fegetenv(&own_mode);
    std::fesetenv(&callers_mode);
    Team team(omp_get_thread_num(), omp_get_num_threads(), barrier, passed);
    task(team, context);
    if (team.rank == 0) barrier->passed = team.passed();
    std::fesetenv(&own_mode);
  }
}

}  // namespace rnnfast::cpu
