// A fingerprint of weights: whether they are, byte for byte, what was packed before.
//
// Weights change behind every version counter there is (`.data`, shared memory, another allocation at the same
// address), so the only sign that cannot be wrong is what they hold. Bound by reading them once.
//
// Lanes of 64 bits run through the bytes side by side, each a chain that starts from a number of its own, so
// order counts; then the lanes are mixed into 64 bits. Two chains that differ meet again with a chance of about
// 2^-64 a step, and a slab of 64 KiB (packs.cpp) has 256 steps: a change goes unseen with a chance of about
// 2^-56, once in 10^16 changes. No number here is secret: this guards against change, not against somebody who
// looks for a collision.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace rnnfast::cpu::RNNFAST_ISA {

constexpr Index hash_block = 256;  // bytes that all lanes take together: the same for every instruction set

// Lanes in one vector register.
using Words = std::uint64_t __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

// Products of the lower halves of words.
RNNFAST_INLINE Words multiply_halves(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// One step of a chain. Each half is spread over a whole word by a multiplication without overflow, and the two
// words meet with their halves crossed. A bit or two of a word change about ten bits of the result or more, so a few
// changed bits of the next word, such as signs, cannot undo it.
RNNFAST_INLINE Words hash_step(Words hash, Words next) {
  hash ^= next;
  const Words lower = multiply_halves(hash, Words{} + 0x9e3779b1);
  const Words upper = multiply_halves(hash >> 32, Words{} + 0xc2b2ae3d);
  return lower + ((upper << 32) | (upper >> 32));
}

// The hash of `bytes` bytes.
inline std::uint64_t hash_bytes(const void* from, std::size_t bytes) {
  constexpr std::size_t vectors = hash_block / sizeof(Words), lanes = hash_block / sizeof(std::uint64_t);
  std::uint64_t lane[lanes];
  for (std::size_t n = 0; n < lanes; ++n) lane[n] = (n + 1) * 0x9e3779b97f4a7c15;
  Words hash[vectors];
  std::memcpy(hash, lane, sizeof hash);
  const auto add = [&](const std::byte* block) RNNFAST_LAMBDA {
#pragma GCC unroll 16
    for (std::size_t v = 0; v < vectors; ++v) {
      Words next;
      std::memcpy(&next, block + v * sizeof next, sizeof next);
      hash[v] = hash_step(hash[v], next);
    }
  };
  const auto* at = static_cast<const std::byte*>(from);
  std::size_t left = bytes;
  for (; left >= hash_block; left -= hash_block, at += hash_block) add(at);
  if (left > 0) {
    std::byte block[hash_block] = {};
    std::memcpy(block, at, left);
    add(block);
  }
  // Now every bit has to reach every other.
  std::memcpy(lane, hash, sizeof hash);
  std::uint64_t mixed = bytes;
  for (std::uint64_t word : lane) {
    mixed = (mixed ^ word) * 0x9e3779b97f4a7c15;
    mixed ^= mixed >> 29;
    mixed *= 0xbf58476d1ce4e5b9;
    mixed ^= mixed >> 32;
  }
  return mixed;
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
