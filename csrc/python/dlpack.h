// What is used here of the table of functions that a tensor's type publishes as __dlpack_c_exchange_api__:
// the layout of DLPack 1.x, which every library that offers it shares (https://dmlc.github.io/dlpack).
//
// Reading a tensor through it takes a sixth of the time that reading its attributes takes.
#pragma once

#include <cstdint>

namespace rnnfast::python::dlpack {

constexpr char capsule_name[] = "dlpack_exchange_api";
constexpr std::uint32_t major_version = 1;
constexpr std::int32_t cpu = 1;  // a device type
constexpr std::uint8_t floating = 2, bfloat = 4;  // number codes

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t axes;
  std::uint8_t number_code, bits;
  std::uint16_t lanes;
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
