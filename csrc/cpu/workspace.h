// Memory that kernels work in: scratch of the calling thread, kept from call to call.
//
// Packed weights and row buffers are needed anew in every call; fresh pages from the system would cost
// more than packing does. What is kept is bounded: a larger piece is given back after the call.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

#include "../rnnfast.h"

namespace rnnfast::cpu {

constexpr std::size_t cache_line = 64;
constexpr std::size_t kept_bytes = std::size_t{64} << 20;

struct FreeMemory {
  std::size_t alignment = cache_line;
  void operator()(std::byte* memory) const;
};
using Memory = std::unique_ptr<std::byte, FreeMemory>;

// Memory for weights and buffers, on huge pages where it is large enough; throws std::bad_alloc.
Memory allocate(std::size_t bytes);

// Asks for huge pages where a large array, which is to be written from end to end, has no pages yet. From some size on
// allocators give memory back to the system and ask for it anew at every call, and then a page of 4 KiB costs
// more than the arithmetic on it. Null: absent.
void prepare_for_writing(void* array, std::size_t bytes);

class Workspace {
 public:
  // The calling thread's workspace. lay_out(take) calls take(pointer, count) for every array, which lets the pointer
  // point to `count` elements at a cache line boundary; it is called twice, first to add up the room. Throws
  // std::bad_alloc.
  template <class LayOut>
  static Workspace& with(LayOut&& lay_out) {
    std::size_t bytes = 0;
    lay_out([&](auto*& array, Index count) { bytes += bytes_for<std::remove_reference_t<decltype(*array)>>(count); });
    Workspace& workspace = with_room(bytes);
    std::byte* free = workspace.memory_.get();
    lay_out([&](auto*& array, Index count) {
      using Element = std::remove_reference_t<decltype(*array)>;
      array = reinterpret_cast<Element*>(free);
      free += bytes_for<Element>(count);
    });
    return workspace;
  }

  template <class Element>
  static std::size_t bytes_for(Index count) {
    const std::size_t bytes = sizeof(Element) * static_cast<std::size_t>(count);
    return (bytes + cache_line - 1) / cache_line * cache_line;
  }

  // Ends a call: every array is void, and more than kept_bytes goes back to the system.
  void release();

 private:
  static Workspace& with_room(std::size_t bytes);

  Memory memory_;
  std::size_t capacity_ = 0;
};

}  // namespace rnnfast::cpu
