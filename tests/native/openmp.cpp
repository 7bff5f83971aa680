#include "openmp.h"

#include <atomic>
#include <thread>
#include <vector>

namespace {

std::atomic<int> regions{0};

struct Place {
  int rank = 0, size = 1;
};
thread_local Place place;

}  // namespace

int regions_with_several_threads() { return regions.load(); }

extern "C" {

int omp_get_thread_num() { return place.rank; }
int omp_get_num_threads() { return place.size; }

// What GCC makes of `#pragma omp parallel num_threads(threads)`.
void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned /*flags*/) {
  if (threads > 1) ++regions;
  const auto run = [&](int rank) {
    const Place before = place;
    place = {rank, int(threads)};
    body(context);
    place = before;
  };
  std::vector<std::thread> workers;
  for (unsigned rank = 1; rank < threads; ++rank) workers.emplace_back(run, int(rank));
  run(0);
  for (std::thread& worker : workers) worker.join();
}

}  // extern "C"
