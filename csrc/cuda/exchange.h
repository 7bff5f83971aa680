// How blocks hand h (or da, going back) round: a number says itself that it has arrived.
//
// Before a launch every place that will be written is filled with `absent`, all bits set, which as a number is
// a NaN that nobody stores (`never_absent`). A reader reads a place until it is there. So a step costs one trip
// of the data, where a flag costs two and a fence: writing is one store, waiting is the read itself. In global
// memory each step has places of its own; in shared memory three steps take turns, and whoever has read the
// numbers of one step empties their places during the next one, when no peer can be two steps ahead.
#pragma once

#include "platform.h"

namespace rnnfast::cuda {

constexpr int absent_byte = 0xff;  // of which a place that is still empty is made

template <class Real>
using BitsOf = std::conditional_t<sizeof(Real) == 2, std::uint16_t,
                                  std::conditional_t<sizeof(Real) == 4, std::uint32_t, std::uint64_t>>;

template <class Real>
RNNFAST_DEVICE BitsOf<Real> bits_of_number(Real number) {
  BitsOf<Real> bits;
  memcpy(&bits, &number, sizeof(bits));
  return bits;
}

template <class Real>
RNNFAST_DEVICE Real number_of_bits(BitsOf<Real> bits) {
  Real number;
  memcpy(&number, &bits, sizeof(number));
  return number;
}

// A NaN of other bits in the place of that one.
template <class Real>
RNNFAST_DEVICE BitsOf<Real> never_absent(Real number) {
  const BitsOf<Real> bits = bits_of_number(number);
  return bits == BitsOf<Real>(~BitsOf<Real>(0)) ? BitsOf<Real>(bits >> 1) : bits;
}

template <class Real>
RNNFAST_DEVICE bool has_arrived(const Real& number) {
  return bits_of_number(number) != BitsOf<Real>(~BitsOf<Real>(0));
}

// All numbers of 16 bytes.
template <class Real>
RNNFAST_DEVICE bool have_arrived(const uint4& numbers) {
  if constexpr (sizeof(Real) == 2) {
    // Whether a half of ~word is zero.
    const auto absent = [](std::uint32_t word) { return (~word - 0x00010001u) & word & 0x80008000u; };
    return (absent(numbers.x) | absent(numbers.y) | absent(numbers.z) | absent(numbers.w)) == 0;
  } else {
    return numbers.x != ~0u && numbers.y != ~0u && numbers.z != ~0u && numbers.w != ~0u;
  }
}

// Where the numbers of a step are read from.
template <class Place>
struct From {
  template <class Real>
  RNNFAST_DEVICE static Real read(const Real* from) {
    return number_of_bits<Real>(load_arriving(Place{}, reinterpret_cast<const BitsOf<Real>*>(from)));
  }
  RNNFAST_DEVICE static uint4 read(const uint4* from) { return load_arriving(Place{}, from); }
};
using FromGlobal = From<InGlobal>;
using FromShared = From<InShared>;

template <class Real>
RNNFAST_DEVICE void publish_number(Real* to, BitsOf<Real> bits) {
  publish(InGlobal{}, reinterpret_cast<BitsOf<Real>*>(to), bits);
}

}  // namespace rnnfast::cuda
