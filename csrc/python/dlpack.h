// What is used here of the table of functions that a tensor's type publishes as __dlpack_c_exchange_api__:
// the layout of DLPack 1.x, which every library that offers it shares (https://dmlc.github.io/dlpack).
//
// Reading a tensor through it takes a sixth of the time that reading its attributes takes.
#pragma once

#include <cstdint>

namespace rnnfast::python::dlpack {

constexpr char capsule_name[] = "dlpack_exchange_api";
constexpr std::uint32_t major_version = 1;
constexpr std::int32_t cpu = 1, cuda = 2;  // device types
constexpr std::uint8_t floating = 2, bfloat = 4;  // number codes

struct Place {
  std::int32_t type, id;

  bool operator==(const Place& other) const { return type == other.type && id == other.id; }
};

struct Number {
  std::uint8_t code, bits;
  std::uint16_t lanes;

  bool operator==(const Number& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  Place place;
  std::int32_t axes;
  Number number;
  std::int64_t* sizes;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* older;
  void* allocate;
  void* from_object;
  void* to_object;
  // 0, or -1 with a Python error set. The result is borrowed: it is valid while the object is unchanged.
  int (*view_of_object)(void* object, Tensor* view);
  void* stream;
};

}  // namespace rnnfast::python::dlpack
