// A team of threads that runs one task together, and the barrier between its steps.
//
// One OpenMP parallel region per call, opened in team.cpp only, so that instruction-set sources hold no
// OpenMP and the process has one thread pool: the one torch uses.
#pragma once

#include <atomic>

#include "../rnnfast.h"

namespace rnnfast::cpu {

struct Range {
  Index begin, end;
  Index size() const { return end - begin; }
};

// The part of [0, count) that falls to one of `size` workers; parts differ by at most one.
inline Range share(Index count, Index rank, Index size) {
  return {count * rank / size, count * (rank + 1) / size};
}

// Spins for the time a balanced step takes, then yields: the threads may outnumber the cores.
class Barrier {
 public:
  void wait(int size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

class Team {
 public:
  Team(int rank, int size, Barrier& barrier) : rank(rank), size(size), barrier_(barrier) {}
  const int rank, size;

  void barrier() {
    if (size > 1) barrier_.wait(size);
  }
  Range share(Index count) const { return cpu::share(count, rank, size); }

 private:
  Barrier& barrier_;
};

using Task = void (*)(Team& team, void* context);

// Runs task(team, context) on `threads` threads, or on fewer where the system gives fewer. Workers take
// over the caller's floating-point mode (rounding, denormals). In a process forked after this library
// was loaded it runs on the caller alone: the pool's threads do not survive a fork.
void run_team(int threads, Task task, void* context);

template <class Body>
void run_team(int threads, Body& body) {
  run_team(
      threads, [](Team& team, void* context) { (*static_cast<Body*>(context))(team); }, &body);
}

}  // namespace rnnfast::cpu
