#include "frozen.h"

#include <map>
#include <mutex>
#include <shared_mutex>
#include <vector>

namespace rnnfast::cpu {
namespace {

struct Copy {
  PackKey key;
  FrozenPack pack;
  std::size_t bytes;
};

struct Frozen {
  std::shared_mutex mutex;
  Name last = 0;
  std::map<Name, std::vector<Copy>> names;  // in use
};

// Never destroyed: threads may still be at work when the process ends.
Frozen& frozen() {
  static Frozen& frozen = *new Frozen;
  return frozen;
}

const Copy* find(const std::vector<Copy>& copies, const PackKey& key) {
  for (const Copy& copy : copies)
    if (copy.key == key) return &copy;
  return nullptr;
}

}  // namespace

bool PackKey::operator==(const PackKey& other) const {
  return w_ih == other.w_ih && w_hh == other.w_hh && w_hr == other.w_hr && I == other.I && H == other.H &&
         h_size == other.h_size && gates == other.gates && vector_width == other.vector_width &&
         real_bytes == other.real_bytes && halved_hh == other.halved_hh && dense_ih == other.dense_ih;
}

Name freeze() {
  Frozen& all = frozen();
  const std::unique_lock lock(all.mutex);
  all.names[++all.last];
  return all.last;
}

void thaw(Name name) {
  Frozen& all = frozen();
  const std::unique_lock lock(all.mutex);
  all.names.erase(name);
}

// Calls only ever try for the lock, as in packs.cpp: who does not get it packs for itself.
FrozenPack find_frozen(Name name, const PackKey& key) {
  Frozen& all = frozen();
  const std::shared_lock lock(all.mutex, std::try_to_lock);
  if (!lock) return nullptr;
  const auto found = all.names.find(name);
  const Copy* copy = found == all.names.end() ? nullptr : find(found->second, key);
  return copy ? copy->pack : nullptr;
}

void keep_frozen(Name name, const PackKey& key, const FrozenPack& pack, std::size_t bytes) {
  Frozen& all = frozen();
  const std::unique_lock lock(all.mutex, std::try_to_lock);
  if (!lock) return;
  const auto found = all.names.find(name);
  if (found != all.names.end() && !find(found->second, key)) found->second.push_back({key, pack, bytes});
}

FrozenState frozen_state() {
  Frozen& all = frozen();
  const std::shared_lock lock(all.mutex);
  FrozenState state{};
  for (const auto& [name, copies] : all.names)
    for (const Copy& copy : copies) {
      ++state.packs;
      state.bytes += copy.bytes;
    }
  return state;
}

}  // namespace rnnfast::cpu
