#include "workspace.h"

#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rnnfast::cpu {

namespace {

// Weights are streamed from the L3 cache at every step: on pages of 4 KiB the processor would look up an
// address every few dozen cycles, and its prefetching stops at the end of each page.
constexpr std::size_t huge_page = std::size_t{2} << 20;

// What glibc's malloc gives back to the system for certain when it is freed.
constexpr std::size_t fresh_bytes = std::size_t{32} << 20;

void ask_for_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  madvise(begin, bytes, MADV_HUGEPAGE);  // a wish: it may fail
#endif
}

}  // namespace

Memory allocate(std::size_t bytes) {
  const std::size_t alignment = bytes >= huge_page ? huge_page : cache_line;
  Memory memory(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment})), {alignment});
  if (bytes >= huge_page) ask_for_huge_pages(memory.get(), bytes / huge_page * huge_page);
  return memory;
}

void prepare_for_writing(void* array, std::size_t bytes) {
  if (!array || bytes < fresh_bytes) return;
  const auto address = reinterpret_cast<std::uintptr_t>(array);
  const std::uintptr_t begin = (address + huge_page - 1) / huge_page * huge_page;
  const std::uintptr_t end = (address + bytes) / huge_page * huge_page;
  ask_for_huge_pages(reinterpret_cast<void*>(begin), end - begin);
}

void FreeMemory::operator()(std::byte* memory) const {
  ::operator delete(memory, std::align_val_t{alignment});
}

Workspace& Workspace::with_room(std::size_t bytes) {
  static thread_local Workspace workspace;
  if (bytes > workspace.capacity_) {
    workspace.memory_.reset();
    workspace.capacity_ = 0;
    workspace.memory_ = allocate(bytes);
    workspace.capacity_ = bytes;
  }
  return workspace;
}

void Workspace::release() {
  if (capacity_ > kept_bytes) {
    memory_.reset();
    capacity_ = 0;
  }
}

}  // namespace rnnfast::cpu
