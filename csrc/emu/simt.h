// Runs a kernel's threads on the processor, one at a time, each on a stack of its own: they change turns only
// at barriers, warp instructions and while they wait for a number. Tests only.
//
// Turns are drawn at random from a seed, so a result that depends on the order of threads comes out
// different for some seed. Besides, two checks: shared memory that two threads use, one of them to write,
// without a barrier between is reported (each access of the kernels goes through load_shared and
// store_shared, or says that it needs no barrier), and so is a launch in which nobody can go on. A launch of
// blocks that need not be resident runs them cluster by cluster, so one that waits for another block does not
// end by luck.
//
// What it can't show: how the memory of a GPU orders what a fence does not, occupancy, speed; nor a race on
// global memory, except where some order of turns changes a result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace rnnfast::emu {

struct Extent {
  int x, y, z;
};

struct Launch {
  std::string what;
  Extent grid;
  int threads;
  int cluster;         // blocks, along x
  std::size_t shared;  // bytes
  bool resident;       // all blocks at once
};

// Runs body() once for every thread; throws std::runtime_error for a race or a launch that cannot end.
void run(const Launch& launch, const std::function<void()>& body);

void set_seed(std::uint64_t seed);

// Whether one thread of every launch, drawn by the seed, gets a turn only when the others have long had nothing to do but
// wait: so that whoever relies on it having gone further is found out.
void set_laggard(bool value);

// What was launched, and how often, since this was last asked.
std::map<std::string, int> take_launches();

// The running thread.
Extent block_index();
int thread_index();
unsigned char* shared_memory();
unsigned char* shared_memory_of(int rank, void* mine);  // where `mine` lies in a cluster peer's
void sync_block();
void sync_cluster();
void yield();      // others' turn, while this one waits for a number
void published();  // somebody may go on
void note(const void* shared, std::size_t bytes, bool write);
void check_bounds(const void* shared, std::size_t bytes);  // as note does, but no barrier need order the access

// All lanes of the warp bring `bytes` and get those of all: 32 entries of 64 bytes. `goes_on`: unless they
// only tell each other that they wait.
const unsigned char* all_lanes(const void* mine, std::size_t bytes, bool goes_on = true);

}  // namespace rnnfast::emu
