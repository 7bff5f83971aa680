// The names of cuda/platform.h on the emulator: what the kernels take from a GPU, on a processor.
#pragma once

#define RNNFAST_EMULATOR

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "../cuda/device.h"
#include "../cuda/real.h"
#include "simt.h"

#define RNNFAST_DEVICE inline
#define RNNFAST_ANYWHERE inline
#define RNNFAST_KERNEL(threads) void
#define RNNFAST_ARGUMENT const
#define RNNFAST_UNROLL
#define RNNFAST_ROLL

namespace rnnfast::cuda {

constexpr bool has_tensor_cores = true, lacks_tensor_cores = true;

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};

using Place = emu::Extent;
using emu::block_index;
using emu::shared_memory;
using emu::sync_block;
using emu::sync_cluster;
using emu::thread_index;
using std::memcpy;

template <class T>
T load_shared(const T* from) {
  emu::note(from, sizeof(T), false);
  return *from;
}

template <class T>
void store_shared(T* to, T value) {
  emu::note(to, sizeof(T), true);
  *to = value;
}

inline uint4 load_global(const uint4* from) { return *from; }
inline void prefetch(const void*) {}

struct InGlobal {};
struct InShared {};

template <class Word>
Word load_arriving(InGlobal, const Word* from) {
  return *from;
}

template <class Word>
Word load_arriving(InShared, const Word* from) {
  emu::check_bounds(from, sizeof(Word));
  return *from;
}

template <class Word>
void publish(InGlobal, Word* to, Word value) {
  *to = value;
  emu::published();
}

template <class Word>
void publish(InShared, Word* to, Word value) {
  emu::check_bounds(to, sizeof(Word));
  publish(InGlobal{}, to, value);
}

template <class Word>
void publish_to_peer(int rank, Word* mine, Word value) {
  publish(InShared{}, reinterpret_cast<Word*>(emu::shared_memory_of(rank, mine)), value);
}

inline bool any_lane_waits(bool waits) {
  const unsigned char* lanes = emu::all_lanes(&waits, sizeof(waits), false);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any = any || lanes[lane * 64];
  return any;
}

inline void relax() { emu::yield(); }

template <class T>
T computed_once(T value) {
  return value;
}
inline unsigned char* shared_memory_once() { return shared_memory(); }

inline void sync_warp() {
  const bool here = true;
  emu::all_lanes(&here, sizeof(here));
}

[[noreturn]] inline void fail() { throw std::runtime_error("a kernel that was not built"); }

template <class T>
T exchange_lanes(T value, int mask) {
  const unsigned char* lanes = emu::all_lanes(&value, sizeof(value));
  memcpy(&value, lanes + ((thread_index() % 32) ^ mask) * 64, sizeof(value));
  return value;
}

template <class T>
T* from_lane(T* value, int lane) {
  const unsigned char* lanes = emu::all_lanes(&value, sizeof(value));
  memcpy(&value, lanes + lane * 64, sizeof(value));
  return value;
}

inline std::uint32_t max_halves(std::uint32_t a, std::uint32_t b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}

template <class State>
State exp_of(State x) {
  return std::exp(x);
}
template <class State>
State inverse(State x) {
  return 1 / x;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float float_of(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(BFloat16 value) { return float_of(std::uint32_t(value.bits) << 16); }

inline float widen(Float16 value) {
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000) << 16;
  const std::uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), float_of(sign | 0x3f800000));
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

template <class Real>
Real narrow(StateOf<Real> value) {
  return value;
}

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const std::uint32_t bits = bits_of(value);
  if (value != value) return {0x7fff};
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 narrow<Float16>(float value) {
  const std::uint16_t sign = std::uint16_t(bits_of(value) >> 16 & 0x8000);
  if (value != value) return {0x7fff};
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {std::uint16_t(sign | 0x7c00)};
  // Rounded to the last place that the magnitude's exponent leaves, ties to even.
  int exponent;
  std::frexp(magnitude, &exponent);
  const int last = std::max(exponent - 11, -24);
  const float units = std::nearbyint(std::ldexp(magnitude, -last));
  if (units < 1024 || last == -24) return {std::uint16_t(sign | std::uint16_t(units))};
  return {std::uint16_t(sign + ((last + 25) << 10) + (int(units) - 1024))};
}

inline std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = bits_of(value);
  if (!std::isfinite(value)) return bits;
  return (bits + 0x1000) & 0xffffe000;  // to nearest, ties away from zero
}

// A number of a fragment: the two halves of a register, or a TF32 number.
template <class Format>
float number_of(std::uint32_t bits, int half) {
  return widen(Format{std::uint16_t(bits >> 16 * half)});
}
template <>
inline float number_of<float>(std::uint32_t bits, int) {
  return float_of(bits & 0xffffe000);
}

// PTX's mma.m16n8k16 and, for TF32, mma.m16n8k8: which lane holds what is in the PTX manual.
template <class Format>
void multiply(float (&sums)[4], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  struct Fragments {
    uint4 a;
    std::uint32_t b[2];
  } mine{a, {b0, b1}};
  constexpr int pair = std::is_same<Format, float>::value ? 1 : 2;
  const int lane = thread_index() % 32;
  const unsigned char* lanes = emu::all_lanes(&mine, sizeof(mine));
  const auto of = [&](int other) {
    Fragments fragments;
    memcpy(&fragments, lanes + other * 64, sizeof(fragments));
    return fragments;
  };
  float products[4] = {0, 0, 0, 0};
  for (int quad = 0; quad < 4; ++quad) {
    const Fragments row = of(lane / 4 * 4 + quad);
    const std::uint32_t upper[2] = {row.a.x, row.a.z}, lower[2] = {row.a.y, row.a.w};
    for (int n = 0; n < 2; ++n) {
      const Fragments column = of((lane % 4 * 2 + n) * 4 + quad);
      for (int part = 0; part < 2; ++part) {
        for (int half = 0; half < pair; ++half) {
          const float b = number_of<Format>(column.b[part], half);
          products[n] += number_of<Format>(upper[part], half) * b;
          products[2 + n] += number_of<Format>(lower[part], half) * b;
        }
      }
    }
  }
  for (int n = 0; n < 4; ++n) sums[n] += products[n];
}

// The host's side

using Stream = void*;

// What the emulated device has; tests set it.
Device& emulated_device();

inline Device query_device(int) { return emulated_device(); }

struct DeviceScope {
  explicit DeviceScope(int) {}
};

struct LaunchShape {
  Place grid;
  int threads;
  int cluster;
  std::size_t shared;
  bool resident;
};

// Refuses what the device would.
template <class... Parameters, class... Arguments>
void launch(const std::string& what, void (*kernel)(Parameters...), const LaunchShape& shape, Stream,
            const Arguments&... arguments) {
  const Device& device = emulated_device();
  const auto refuse = [&](const char* why) { throw std::runtime_error(what + ": " + why); };
  if (shape.shared > std::size_t(device.shared_bytes)) refuse("more shared memory than a block can have");
  if (shape.cluster > device.largest_cluster) refuse("a larger cluster than the device has");
  if (shape.grid.y > 65535 || shape.grid.z > 65535) refuse("a grid out of bounds");
  if (shape.grid.x < 1 || shape.grid.y < 1 || shape.grid.z < 1) refuse("an empty grid");
  const std::int64_t blocks = std::int64_t(shape.grid.x) * shape.grid.y * shape.grid.z;
  if (shape.resident && (!device.cooperative || blocks > device.multiprocessors))
    refuse("too many blocks for a cooperative launch");
  const std::tuple<std::decay_t<Parameters>...> copies{arguments...};
  emu::run({what, shape.grid, shape.threads, shape.cluster, shape.shared, shape.resident},
           [&] { std::apply(kernel, copies); });
}

inline void fill(void* memory, int byte, std::size_t bytes, std::size_t rows, std::size_t pitch, Stream) {
  for (std::size_t row = 0; row < rows; ++row) std::memset(static_cast<char*>(memory) + row * pitch, byte, bytes);
}

}  // namespace rnnfast::cuda
