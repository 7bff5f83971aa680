// Kernels with a planted fault each, so that a test can see the emulator find it.
#pragma once

#include "platform.h"

namespace rnnfast::cuda {

// Neighbours exchange numbers through shared memory, with a barrier between or without.
inline void exchange_in_shared(bool with_barrier) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index();
  store_shared(shared + thread, float(thread));
  if (with_barrier) sync_block();
  load_shared(shared + (thread + 1) % 64);
}

// Blocks of a cluster write to a peer, and meet at the cluster's barrier or at their own.
inline void exchange_in_cluster(bool with_barrier) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index();
  store_shared(reinterpret_cast<float*>(emu::shared_memory_of(1 - block_index().x, shared + thread)), float(thread));
  if (with_barrier) {
    sync_cluster();
  } else {
    sync_block();
  }
  load_shared(shared + thread);
}

inline void pass_by_a_barrier(bool all_come) {
  if (all_come || thread_index() > 0) sync_block();
}

// All lanes of a warp wait together, as the kernels do.
inline void wait_for_a_number(std::uint32_t* number, bool is_published) {
  if (block_index().x == 0) {
    while (any_lane_waits(load_arriving(InGlobal{}, number) == 0)) relax();
  } else if (is_published) {
    publish(InGlobal{}, number, 1u);
  }
}

inline void read_out_of_bounds(bool inside) {
  load_shared(reinterpret_cast<float*>(shared_memory()) + (inside ? 63 : 64));
}

// Runs one of them, at fault or not.
inline void run_fault(const std::string& fault, bool at_fault) {
  const LaunchShape one{{1, 1, 1}, 64, 1, 256, false};
  if (fault == "race") return launch(fault, exchange_in_shared, one, nullptr, !at_fault);
  if (fault == "barrier") return launch(fault, pass_by_a_barrier, one, nullptr, !at_fault);
  if (fault == "bounds") return launch(fault, read_out_of_bounds, one, nullptr, !at_fault);
  if (fault == "cluster race")
    return launch(fault, exchange_in_cluster, {{2, 1, 1}, 64, 2, 256, false}, nullptr, !at_fault);
  std::uint32_t number = 0;
  if (fault == "number")
    return launch(fault, wait_for_a_number, {{2, 1, 1}, 64, 1, 256, true}, nullptr, &number, !at_fault);
  // The blocks need not be resident, so the first one waits for a block that has not begun.
  if (fault == "residency")
    return launch(fault, wait_for_a_number, {{2, 1, 1}, 64, 1, 256, !at_fault}, nullptr, &number, true);
  throw std::invalid_argument("unknown fault " + fault);
}

}  // namespace rnnfast::cuda
