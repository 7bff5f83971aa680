// A fingerprint of weights: whether they are, byte for byte, what was packed before.
//
// Weights change behind every version counter there is (`.data`, shared memory, another allocation at the same
// address), so the only sign that cannot be wrong is what they hold. Bound by reading them once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rnnfast::cpu {

using Fingerprint = std::uint64_t;

// The hash of `bytes` bytes. Its values hold for this process: another processor may hash in another way.
Fingerprint hash_bytes(const void* from, std::size_t bytes);

// The same with nothing but what every processor has.
Fingerprint hash_bytes_portably(const void* from, std::size_t bytes);

}  // namespace rnnfast::cpu
