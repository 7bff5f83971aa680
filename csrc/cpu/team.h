// A team of threads that runs one task together, and the barrier between its steps.
//
// One OpenMP parallel region per call, opened in team.cpp only, so that instruction-set sources hold no
// OpenMP and the process has one thread pool: the one torch uses.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

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

// How many barriers each member of a team has come to.
//
// Everybody counts in a line of its own and reads the others', so a barrier takes as long as a line takes from core to
// core; one count for all would pass through every core in turn. Counts go on from team to team: to set them back would
// take those lines to another core and back.
class Barrier {
 public:
  using Count = std::uint64_t;

  // The calling thread's, with room for so many members; throws std::bad_alloc. Of one team at a time.
  static Barrier& with_room(int members);

  // Waits until all of `size` members have come to barrier `count`, to which member `rank` comes now. Spins for the time
  // a balanced step takes, then yields: the threads may outnumber the cores.
  void wait(int rank, int size, Count count);

  Count passed = 0;  // by the teams before

 private:
  struct alignas(64) Place {
    std::atomic<Count> count;
  };
  std::unique_ptr<Place[]> places_;
  int room_ = 0;
};

class Team {
 public:
  Team(int rank, int size, Barrier* barrier, Barrier::Count passed)
      : rank(rank), size(size), barrier_(barrier), passed_(passed) {}
  const int rank, size;

  void barrier();
  Barrier::Count passed() const { return passed_; }
  Range share(Index count) const { return cpu::share(count, rank, size); }

 private:
  Barrier* barrier_;  // none for one member
  Barrier::Count passed_;
};

using Task = void (*)(Team& team, void* context);

// Runs task(team, context) on `threads` threads, or on fewer where the system gives fewer. Workers take
// over the caller's floating-point mode (rounding, denormals). In a process forked after this library
// was loaded it runs on the caller alone: the pool's threads do not survive a fork.
void run_team(int threads, Task task, void* context);

// Everybody calls a copy: what the body holds then comes from the caller's cache at once, as one piece, where what it
// refers to would come line by line, each when it is first asked for.
template <class Body>
void run_team(int threads, const Body& body) {
  const auto task = [](Team& team, void* context) {
    const Body own = *static_cast<const Body*>(context);
    own(team);
  };
  run_team(threads, task, const_cast<Body*>(&body));
}

}  // namespace rnnfast::cpu
