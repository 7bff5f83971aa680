// Lanes run through the bytes side by side, each a chain that starts from a number of its own, so order counts;
// then the lanes are mixed into 64 bits. A step of a chain loses nothing: as long as the bytes that follow are the
// same, chains that differ stay different. Two that differ in what follows meet again by chance, and a slab of 64 KiB
// (packs.cpp) has 512 steps; see each chain. No number here is secret: this guards against change, not against
// somebody who looks for a collision.
#include "fingerprint.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnfast::cpu {
namespace {

constexpr std::size_t block_bytes = 128;  // that all chains take together
constexpr std::uint64_t odd_constants[] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9};

// Bytes block by block, the last one filled up with zeros.
struct Blocks {
  const std::byte* first;
  std::size_t whole;
  std::byte last[block_bytes] = {};
  std::size_t count;

  Blocks(const void* from, std::size_t bytes)
      : first(static_cast<const std::byte*>(from)),
        whole(bytes / block_bytes),
        count((bytes + block_bytes - 1) / block_bytes) {
    if (count > whole) std::memcpy(last, first + whole * block_bytes, bytes - whole * block_bytes);
  }
  const std::byte* at(std::size_t block) const { return block < whole ? first + block * block_bytes : last; }
};

#if defined(__x86_64__)

// Chains of 128 bits; a step is one round of the AES cipher, with the next bytes as its key: a single instruction, two
// of them a cycle. A round spreads a changed byte over four, each by a table without linear structure, so what
// follows would have to change in the same four bytes, by the right one of about 2^7 patterns, to undo it; bytes
// that change at random do so with a chance of 2^-128.
__attribute__((target("aes"))) Fingerprint hash_by_cipher(const void* from, std::size_t bytes) {
  constexpr int chains = block_bytes / sizeof(__m128i);
  __m128i chain[chains];
  for (int n = 0; n < chains; ++n)
    chain[n] = _mm_set1_epi64x(static_cast<long long>((static_cast<std::uint64_t>(n) + 1) * odd_constants[0]));
  const Blocks blocks(from, bytes);
  for (std::size_t block = 0; block < blocks.count; ++block) {
    const auto* next = reinterpret_cast<const __m128i*>(blocks.at(block));
#pragma GCC unroll 8
    for (int n = 0; n < chains; ++n) chain[n] = _mm_aesenc_si128(chain[n], _mm_loadu_si128(next + n));
  }
  // Three rounds after each chain: every bit has then reached every other. With fewer, what one chain changes, the
  // next could undo.
  __m128i mixed = _mm_set1_epi64x(static_cast<long long>(bytes));
  const __m128i key = _mm_set_epi64x(static_cast<long long>(odd_constants[0]), static_cast<long long>(odd_constants[1]));
  for (const __m128i& lane : chain) {
    mixed = _mm_xor_si128(mixed, lane);
    for (int round = 0; round < 3; ++round) mixed = _mm_aesenc_si128(mixed, key);
  }
  return static_cast<Fingerprint>(_mm_cvtsi128_si64(mixed));
}

#endif

// One step of a chain of 64 bits. Each half is spread over a whole word by a multiplication without overflow, and the
// two words meet with their halves crossed. A bit or two of a word change about ten bits of the result or more, so a
// few changed bits of the next word, such as signs, cannot undo it; any others with a chance of about 2^-64.
std::uint64_t step(std::uint64_t chain, std::uint64_t next) {
  chain ^= next;
  const std::uint64_t lower = (chain & 0xffffffff) * 0x9e3779b1, upper = (chain >> 32) * 0xc2b2ae3d;
  return lower + ((upper << 32) | (upper >> 32));
}

}  // namespace

Fingerprint hash_bytes_portably(const void* from, std::size_t bytes) {
  constexpr std::size_t chains = block_bytes / sizeof(std::uint64_t);
  std::uint64_t chain[chains];
  for (std::size_t n = 0; n < chains; ++n) chain[n] = (n + 1) * odd_constants[0];
  const Blocks blocks(from, bytes);
  for (std::size_t block = 0; block < blocks.count; ++block) {
    std::uint64_t next[chains];
    std::memcpy(next, blocks.at(block), block_bytes);
    for (std::size_t n = 0; n < chains; ++n) chain[n] = step(chain[n], next[n]);
  }
  std::uint64_t mixed = bytes;
  for (const std::uint64_t word : chain) {
    mixed = (mixed ^ word) * odd_constants[0];
    mixed ^= mixed >> 29;
    mixed *= odd_constants[1];
    mixed ^= mixed >> 32;
  }
  return mixed;
}

Fingerprint hash_bytes(const void* from, std::size_t bytes) {
#if defined(__x86_64__)
  static const bool has_cipher = __builtin_cpu_supports("aes");
  if (has_cipher) return hash_by_cipher(from, bytes);
#endif
  return hash_bytes_portably(from, bytes);
}

}  // namespace rnnfast::cpu
