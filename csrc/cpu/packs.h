// Packed weights kept from call to call.
//
// Weights that stay the same need packing once: the pool keeps packed copies together with the fingerprint of what they were made from,
// and a call uses a copy only if the weights still have that fingerprint (fingerprint.h). A call owns its copy
// alone: concurrent calls of one layer get copies of their own, so nothing is ever written while another
// reads it.
//
// Weights that change from call to call, as in training, would be fingerprinted for nothing. After two
// changes in a row they are left alone for a while, and longer each time: 1, 3, 7, ... 63 calls pack for
// themselves.
//
// Frozen weights (frozen.h) need neither: a copy under their name is right, and calls read it together.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <vector>

#include "fingerprint.h"
#include "frozen.h"
#include "team.h"
#include "workspace.h"

namespace rnnfast::cpu {

// Copies in use by calls are not counted.
constexpr std::size_t most_pool_bytes = std::size_t{256} << 20;
constexpr std::size_t most_pool_packs = 256;

// The packed weights of one layer, for the time of one call.
class Pack {
 public:
  // Takes a copy from the pool, or one under the name of frozen weights, or makes room for `bytes`; throws
  // std::bad_alloc. 0 bytes: nothing is packed.
  Pack(const PackKey& key, Name frozen, std::size_t bytes);
  // Gives the copy back to the pool.
  ~Pack();
  Pack(const Pack&) = delete;
  Pack& operator=(const Pack&) = delete;

  // Where packed weights belong; null while they are not worth keeping: then they belong to the call.
  std::byte* memory() const;

  // Every member of the team calls this: afterwards the weights are packed as they are now. pack_share() packs
  // the calling member's share.
  template <class PackShare>
  void refresh(Team& team, PackShare&& pack_share) {
    if (is_found_) return;
    const bool keeps = !kept_.empty() && memory();
    if (keeps) {
      hash_share(team, before_);
      team.barrier();
      if (is_current()) return;
    }
    pack_share();
    // Once more: if another thread writes weights meanwhile, the copy is half old, half new.
    if (keeps) hash_share(team, after_);
    team.barrier();
  }

  // After the team: notes what the copy holds.
  void settle();

  struct Kept {
    PackKey key;
    Memory memory;
    std::size_t bytes;
    std::optional<Fingerprint> fingerprint;  // of the weights that memory holds
    int changes;                             // in a row
    int calls_to_rest;
  };

 private:
  using Hashes = std::vector<Fingerprint>;  // of slabs: of w_ih, of w_hh, of w_hr
  void hash_share(Team& team, Hashes& slabs) const;
  Fingerprint fingerprint_of(const Hashes& slabs) const;
  bool is_current() const;

  PackKey key_;
  Name name_;
  std::size_t bytes_;
  FrozenPack frozen_;      // the copy, where weights have a name
  bool is_found_ = false;  // it was there before the call
  std::list<Kept> kept_;   // else; at most one: a list, because its node moves to the pool and back as it is
  Hashes before_, after_;
};

struct PoolState {
  std::size_t packs, bytes;
  std::uint64_t reused, packed;  // calls, since the process began, that found their copy right, and that did not
};
PoolState pool_state();

// Gives all kept copies back to the system.
void empty_pool();

}  // namespace rnnfast::cpu
