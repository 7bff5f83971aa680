// Packed weights of layers whose owner has promised to leave their weights as they are.
//
// Such weights have a name, and what was packed under it stays right for as long as the name is in use: a call
// need not look at the weights again. A copy is made once, is read by any number of calls at a time, and goes
// with its name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "../rnnfast.h"

namespace rnnfast::cpu {

using Name = std::uint64_t;  // 0: none

// Where the weights of a layer are, and all that decides how they are laid out when packed.
struct PackKey {
  const void *w_ih, *w_hh, *w_hr;  // w_hr: null where h is not projected
  Index I, H, h_size, gates;
  Index vector_width, real_bytes;
  bool halved_hh;  // w_hh is kept as bfloat16
  bool dense_ih;   // w_ih's columns stand without gaps between gates

  bool operator==(const PackKey& other) const;
};

using FrozenPack = std::shared_ptr<std::byte>;

// A name that was never in use.
Name freeze();
// Ends the use of a name: its copies go as soon as no call reads them.
void thaw(Name name);

// The copy made under a name in use, or nothing.
FrozenPack find_frozen(Name name, const PackKey& key);
// Keeps a copy for the calls to come, if the name is still in use.
void keep_frozen(Name name, const PackKey& key, const FrozenPack& pack, std::size_t bytes);

struct FrozenState {
  std::size_t packs, bytes;
};
FrozenState frozen_state();

}  // namespace rnnfast::cpu
