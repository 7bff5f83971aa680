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

// Whether all of some numbers have arrived: as unsigned words none of them is the largest that there is.
template <class Real>
struct Arrivals {
  std::conditional_t<sizeof(Real) == 8, std::uint64_t, std::uint32_t> largest = 0;

  RNNFAST_DEVICE void add(const uint4& numbers) {
    if constexpr (sizeof(Real) == 8) {
      const std::uint64_t one = numbers.x | std::uint64_t(numbers.y) << 32;
      const std::uint64_t other = numbers.z | std::uint64_t(numbers.w) << 32;
      largest = max_of(largest, max_of(one, other));
    } else if constexpr (sizeof(Real) == 2) {
      largest = max_halves(max_halves(largest, max_halves(numbers.x, numbers.y)), max_halves(numbers.z, numbers.w));
    } else {
      largest = max_of(max_of(largest, max_of(numbers.x, numbers.y)), max_of(numbers.z, numbers.w));
    }
  }
  RNNFAST_DEVICE bool are_missing() const {
    if constexpr (sizeof(Real) == 2) return (largest & 0xffff) == 0xffff || largest >> 16 == 0xffff;
    return largest == decltype(largest)(BitsOf<Real>(~BitsOf<Real>(0)));
  }

 private:
  template <class Word>
  static RNNFAST_DEVICE Word max_of(Word a, Word b) {
    return a > b ? a : b;
  }
};

// Where the numbers of a step are read from.
template <class Place>
struct From {
  RNNFAST_DEVICE static uint4 read(const uint4* from) { return load_arriving(Place{}, from); }
};
using FromGlobal = From<InGlobal>;
using FromShared = From<InShared>;

}  // namespace rnnfast::cuda
