#include "packs.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

namespace rnnfast::cpu {
namespace {

constexpr int most_calls_to_rest = 63;

// Weights are hashed by slabs of this size, then the slabs' hashes: threads share the slabs, and however many
// threads there are, the fingerprint is the same.
constexpr std::size_t slab_bytes = std::size_t{64} << 10;

Index slab_count(std::size_t bytes) { return static_cast<Index>((bytes + slab_bytes - 1) / slab_bytes); }

struct Pool {
  std::mutex mutex;
  std::list<Pack::Kept> packs;  // the most recently used first
  std::size_t bytes = 0;
  std::atomic<std::uint64_t> reused{0}, packed{0};
};

// Never destroyed: threads may still be at work when the process ends.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

// Calls only ever try for the lock: who does not get it packs for itself, or drops its copy. In a forked child it
// may be held for ever by a thread that is not there.
using Lock = std::unique_lock<std::mutex>;

struct Matrix {
  const void* weights;
  std::size_t bytes;
};

std::array<Matrix, 3> matrices_of(const PackKey& key) {
  const auto bytes = [&](Index rows, Index columns) {
    return static_cast<std::size_t>(rows * columns * key.real_bytes);
  };
  return {{{key.w_ih, bytes(key.gates * key.H, key.I)},
           {key.w_hh, bytes(key.gates * key.H, key.h_size)},
           {key.w_hr, key.w_hr ? bytes(key.h_size, key.H) : 0}}};
}

void trim(Pool& pool) {
  while (pool.bytes > most_pool_bytes || pool.packs.size() > most_pool_packs) {
    pool.bytes -= pool.packs.back().bytes;
    pool.packs.pop_back();
  }
}

}  // namespace

Pack::Pack(const PackKey& key, Name frozen, std::size_t bytes) : key_(key), name_(frozen), bytes_(bytes) {
  if (bytes == 0) return;
  if (name_) {
    frozen_ = find_frozen(name_, key);
    is_found_ = bool(frozen_);
    if (!is_found_) frozen_ = allocate(bytes);
    return;
  }
  Pool& pool = cpu::pool();
  if (Lock lock(pool.mutex, std::try_to_lock); lock) {
    const auto found = std::find_if(pool.packs.begin(), pool.packs.end(),
                                    [&](const Kept& kept) { return kept.key == key; });
    if (found != pool.packs.end()) {
      pool.bytes -= found->bytes;
      kept_.splice(kept_.begin(), pool.packs, found);
    }
  }
  if (kept_.empty()) kept_.push_back({key, nullptr, 0, std::nullopt, 0, 0});
  Kept& kept = kept_.front();
  const bool rests = kept.calls_to_rest > 0;
  if (rests || bytes > most_pool_bytes) {
    if (rests) --kept.calls_to_rest;
    pool.packed.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  if (!kept.memory) {
    kept.memory = allocate(bytes);
    kept.bytes = bytes;
  }
  Index slabs = 0;
  for (const Matrix& matrix : matrices_of(key)) slabs += slab_count(matrix.bytes);
  before_.resize(static_cast<std::size_t>(slabs));
  after_.resize(static_cast<std::size_t>(slabs));
}

Pack::~Pack() {
  if (kept_.empty()) return;
  Pool& pool = cpu::pool();
  const Lock lock(pool.mutex, std::try_to_lock);
  if (!lock) return;
  pool.bytes += kept_.front().bytes;
  pool.packs.splice(pool.packs.begin(), kept_);
  trim(pool);
}

void Pack::settle() {
  Pool& pool = cpu::pool();
  if (frozen_) {
    (is_found_ ? pool.reused : pool.packed).fetch_add(1, std::memory_order_relaxed);
    if (!is_found_) keep_frozen(name_, key_, frozen_, bytes_);
    return;
  }
  if (!memory()) return;
  Kept& kept = kept_.front();
  if (is_current()) {
    pool.reused.fetch_add(1, std::memory_order_relaxed);
    kept.changes = 0;
    return;
  }
  pool.packed.fetch_add(1, std::memory_order_relaxed);
  const bool changed = kept.fingerprint.has_value();
  kept.fingerprint.reset();
  if (before_ == after_) kept.fingerprint = fingerprint_of(before_);
  if (changed && ++kept.changes > 1) {
    kept.calls_to_rest = std::min((1 << std::min(kept.changes - 1, 16)) - 1, most_calls_to_rest);
    kept.fingerprint.reset();
    kept.memory.reset();
    kept.bytes = 0;
  }
}

std::byte* Pack::memory() const {
  if (frozen_) return frozen_.get();
  return kept_.empty() ? nullptr : kept_.front().memory.get();
}

void Pack::hash_share(Team& team, Hashes& slabs) const {
  const Range own = team.share(static_cast<Index>(slabs.size()));
  Index first = 0;  // slab of the matrix
  for (const Matrix& matrix : matrices_of(kept_.front().key)) {
    const Index end = first + slab_count(matrix.bytes);
    for (Index n = std::max(own.begin, first); n < std::min(own.end, end); ++n) {
      const std::size_t begin = static_cast<std::size_t>(n - first) * slab_bytes;
      slabs[static_cast<std::size_t>(n)] =
          hash_bytes(static_cast<const std::byte*>(matrix.weights) + begin, std::min(slab_bytes, matrix.bytes - begin));
    }
    first = end;
  }
}

Fingerprint Pack::fingerprint_of(const Hashes& slabs) const {
  return hash_bytes(slabs.data(), slabs.size() * sizeof(Fingerprint));
}

bool Pack::is_current() const { return kept_.front().fingerprint == fingerprint_of(before_); }

PoolState pool_state() {
  Pool& pool = cpu::pool();
  const Lock lock(pool.mutex);
  return {pool.packs.size(), pool.bytes, pool.reused.load(), pool.packed.load()};
}

void empty_pool() {
  Pool& pool = cpu::pool();
  const Lock lock(pool.mutex);
  pool.packs.clear();
  pool.bytes = 0;
}

}  // namespace rnnfast::cpu
