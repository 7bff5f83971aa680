#include "workspace.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rnnfast::cpu {

namespace {

// Weights are streamed from the L3 cache at every step: on pages of 4 KiB the processor would look up an
// address every few dozen cycles, and its prefetching stops at the end of each page.
constexpr std::size_t huge_page = std::size_t{2} << 20;

}  // namespace

Memory allocate(std::size_t bytes) {
  const std::size_t alignment = bytes >= huge_page ? huge_page : cache_line;
  Memory memory(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment})), {alignment});
#if defined(__linux__)
  if (bytes >= huge_page) madvise(memory.get(), bytes / huge_page * huge_page, MADV_HUGEPAGE);
#endif
  return memory;
}

void FreeMemory::operator()(std::byte* memory) const {
  ::operator delete(memory, std::align_val_t{alignment});
}

Workspace& Workspace::with_room(std::size_t bytes) {
  static thread_local Workspace workspace;
  workspace.used_ = 0;
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
