#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace rnnfast::emu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t stack_bytes = 256 << 10;
#else
constexpr std::size_t stack_bytes = 64 << 10;
#endif
constexpr std::size_t lane_bytes = 64;
constexpr std::size_t grain = 2;  // bytes of shared memory that are watched together

struct Fiber;

// Holds its members back until all have come.
struct Barrier {
  int members = 0;
  std::vector<Fiber*> waiting;
};

// The last uses of a grain of shared memory.
struct Use {
  int thread = -1;  // of the whole launch
  int block = -1;
  int block_epoch = 0, cluster_epoch = 0;
};

struct Watched {
  Use write, read, other_read;
};

struct Cluster {
  Barrier barrier;
  int epoch = 0;
};

struct Block {
  Extent index{};
  int number = 0;
  int epoch = 0;  // barriers passed
  Cluster* cluster = nullptr;
  Block* first = nullptr;  // of its cluster; the others follow
  Barrier barrier;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::vector<Watched> watched;
};

struct Warp {
  Barrier barrier;
  unsigned char lanes[2][32 * lane_bytes];
};

struct Fiber {
  ucontext_t context{};
  std::vector<unsigned char> stack;
  void* fake_stack = nullptr;
  jmp_buf jump;
  bool entered = false;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0, number = 0;
  int turn = 0;  // which of the warp's two buffers is next
  bool done = false;
};

std::uint64_t seed = 1;
bool has_laggard = false;
std::map<std::string, int> launches;

// One launch.
class Executor {
 public:
  Executor(const Launch& launch, const std::function<void()>& body) : launch_(launch), body_(body) {}

  // Runs `count` blocks, from block number `begin` on, side by side.
  void run(int begin, int count) {
    const int warps = (launch_.threads + 31) / 32;
    blocks_.assign(std::size_t(count), {});
    clusters_.assign(std::size_t(count / launch_.cluster), {});
    warps_.assign(std::size_t(count * warps), {});
    const int threads = count * launch_.threads;
    while (int(fibers_.size()) < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack.resize(stack_bytes);
    }
    for (int n = 0; n < count; ++n) {
      Block& block = blocks_[std::size_t(n)];
      const int number = begin + n;
      block.number = number;
      block.index = {number % launch_.grid.x, number / launch_.grid.x % launch_.grid.y,
                     number / launch_.grid.x / launch_.grid.y};
      block.cluster = &clusters_[std::size_t(n / launch_.cluster)];
      block.cluster->barrier.members = launch_.cluster * launch_.threads;
      block.first = &blocks_[std::size_t(n / launch_.cluster * launch_.cluster)];
      block.barrier.members = launch_.threads;
      block.memory.assign(launch_.shared + 128, 0xff);  // NaNs: nobody may count on zeros
      const auto address = reinterpret_cast<std::uintptr_t>(block.memory.data());
      block.shared = block.memory.data() + (128 - address % 128) % 128;
      block.watched.assign(launch_.shared / grain + 1, {});
      for (int thread = 0; thread < launch_.threads; ++thread) {
        const int at = n * launch_.threads + thread;
        Warp& warp = warps_[std::size_t(n * warps + thread / 32)];
        warp.barrier.members = std::min(32, launch_.threads - thread / 32 * 32);
        Fiber& fiber = *fibers_[std::size_t(at)];
        fiber.block = &block;
        fiber.warp = &warp;
        fiber.thread = thread;
        fiber.number = number * launch_.threads + thread;
        fiber.turn = 0;
        fiber.done = false;
        fiber.entered = false;
        fiber.fake_stack = nullptr;
        start(fiber);
        runnable_.push_back(&fiber);
      }
    }
    schedule(threads);
  }

  Fiber& current() { return *current_; }

  void wait_at(Barrier& barrier, int* epoch, bool goes_on = true) {
    if (int(barrier.waiting.size()) + 1 < barrier.members) {
      barrier.waiting.push_back(current_);
      leave_runnable();
      switch_to_scheduler();
    } else {
      if (epoch) ++*epoch;
      runnable_.insert(runnable_.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
      if (goes_on) idle_ = 0;
    }
  }

  void yield() {
    ++idle_;
    switch_to_scheduler();
  }
  void published() { idle_ = 0; }

  void fail(const std::string& why) { throw std::runtime_error(launch_.what + ": " + why); }

 private:
  void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Executor::main, 0);
  }

  static void main();

  void leave_runnable() {
    runnable_[picked_] = runnable_.back();
    runnable_.pop_back();
  }

  void schedule(int threads) {
    int unfinished = threads;
    idle_ = 0;
    const Fiber* const laggard = has_laggard ? fibers_[seed % std::uint64_t(threads)].get() : nullptr;
    while (unfinished > 0) {
      if (runnable_.empty()) fail("threads wait at a barrier that others have passed by");
      if (idle_ > 1000 + 100 * runnable_.size()) fail("threads wait for a number that nobody publishes");
      // xorshift64
      seed ^= seed << 13;
      seed ^= seed >> 7;
      seed ^= seed << 17;
      picked_ = seed % runnable_.size();
      current_ = runnable_[picked_];
      if (current_ == laggard && runnable_.size() > 1 && std::size_t(idle_) <= 2 * runnable_.size()) continue;
      switch_to(*current_);
      if (error_) std::rethrow_exception(error_);
      if (current_->done) {
        leave_runnable();
        --unfinished;
        idle_ = 0;
      }
    }
  }

#if defined(__SANITIZE_ADDRESS__)
  // The sanitizer has to know on which stack it is.
  void switch_to(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack.data(), fiber.stack.size());
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
  }
  void switch_to_scheduler() {
    Fiber& fiber = *current_;
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, stack_, stack_size_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_, &stack_size_);
  }
  void entered() { __sanitizer_finish_switch_fiber(nullptr, &stack_, &stack_size_); }
  const void* stack_ = nullptr;
  std::size_t stack_size_ = 0;
  void* fake_stack_ = nullptr;
#else
  // swapcontext calls the kernel each time; jumps between contexts that have been entered don't.
  void switch_to(Fiber& fiber) {
    if (_setjmp(jump_)) return;
    if (fiber.entered) _longjmp(fiber.jump, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
  }
  void switch_to_scheduler() {
    if (_setjmp(current_->jump) == 0) _longjmp(jump_, 1);
  }
  void entered() {}
  jmp_buf jump_;
#endif

  const Launch& launch_;
  const std::function<void()>& body_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> runnable_;
  std::size_t picked_ = 0;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_{};
  std::size_t idle_ = 0;  // turns in a row that brought nothing
  std::exception_ptr error_;
};

Executor* executor = nullptr;

void Executor::main() {
  executor->entered();
  try {
    executor->body_();
  } catch (...) {
    executor->error_ = std::current_exception();
  }
  executor->current_->done = true;
  executor->switch_to_scheduler();
}

Block& block() { return *executor->current().block; }

}  // namespace

void run(const Launch& launch, const std::function<void()>& body) {
  if (executor) throw std::logic_error("the emulator runs one launch at a time");
  Executor own(launch, body);
  const struct Scope {
    ~Scope() { executor = nullptr; }
  } scope;
  executor = &own;
  ++launches[launch.what];
  const int blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  const int at_once = launch.resident ? blocks : launch.cluster;
  if (launch.grid.x % launch.cluster) own.fail("the grid is not made of whole clusters");
  for (int begin = 0; begin < blocks; begin += at_once) own.run(begin, at_once);
}

std::map<std::string, int> take_launches() { return std::exchange(launches, {}); }

void set_seed(std::uint64_t value) { seed = value ? value : 1; }

void set_laggard(bool value) { has_laggard = value; }

Extent block_index() { return block().index; }
int thread_index() { return executor->current().thread; }
unsigned char* shared_memory() { return block().shared; }

unsigned char* shared_memory_of(int rank, void* mine) {
  return block().first[rank].shared + (static_cast<unsigned char*>(mine) - block().shared);
}

void sync_block() { executor->wait_at(block().barrier, &block().epoch); }
void sync_cluster() { executor->wait_at(block().cluster->barrier, &block().cluster->epoch); }
void yield() { executor->yield(); }
void published() { executor->published(); }

const unsigned char* all_lanes(const void* mine, std::size_t bytes, bool goes_on) {
  Fiber& fiber = executor->current();
  // Two buffers in turn: whoever is one instruction ahead does not overwrite what others still read.
  unsigned char* lanes = fiber.warp->lanes[fiber.turn];
  fiber.turn ^= 1;
  if (bytes > lane_bytes) executor->fail("a warp instruction on more than its buffers hold");
  std::memcpy(lanes + std::size_t(fiber.thread % 32) * lane_bytes, mine, bytes);
  executor->wait_at(fiber.warp->barrier, nullptr, goes_on);
  return lanes;
}

// The block of the cluster in whose shared memory this lies.
static Block& owner_of(const void* address, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  Block* owner = executor->current().block;
  for (Block* peer = owner->first; peer < owner->first + owner->cluster->barrier.members / owner->barrier.members;
       ++peer)
    if (at >= peer->shared && at < peer->shared + peer->memory.size()) owner = peer;
  if (at < owner->shared || std::size_t(at - owner->shared) + bytes > owner->memory.size() - 128)
    executor->fail("shared memory is used out of bounds");
  return *owner;
}

void check_bounds(const void* address, std::size_t bytes) { owner_of(address, bytes); }

void note(const void* address, std::size_t bytes, bool write) {
  Fiber& fiber = executor->current();
  Block* owner = &owner_of(address, bytes);
  const std::size_t offset = std::size_t(static_cast<const unsigned char*>(address) - owner->shared);
  const Use now{fiber.number, fiber.block->number, fiber.block->epoch, fiber.block->cluster->epoch};
  // Blocks of a cluster meet at its barrier alone.
  const auto clash = [&](const Use& before) {
    return before.thread >= 0 && before.thread != now.thread &&
           before.cluster_epoch == now.cluster_epoch &&
           (before.block != now.block || before.block_epoch == now.block_epoch);
  };
  for (std::size_t n = offset / grain; n <= (offset + bytes - 1) / grain; ++n) {
    Watched& watched = owner->watched[n];
    if (clash(watched.write) || (write && (clash(watched.read) || clash(watched.other_read))))
      executor->fail("two threads use shared memory, one to write, with no barrier between");
    if (write) {
      watched.write = now;
    } else if (watched.read.thread != now.thread) {
      watched.other_read = watched.read;
      watched.read = now;
    } else {
      watched.read = now;
    }
  }
}

}  // namespace rnnfast::emu
