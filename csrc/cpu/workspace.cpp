#include "workspace.h"

#include <new>

namespace rnnfast::cpu {

void Workspace::Free::operator()(std::byte* memory) const {
  ::operator delete(memory, std::align_val_t{cache_line});
}

Workspace& Workspace::with_room(std::size_t bytes) {
  static thread_local Workspace workspace;
  workspace.used_ = 0;
  if (bytes > workspace.capacity_) {
    workspace.memory_.reset();
    workspace.capacity_ = 0;
    workspace.memory_.reset(
        static_cast<std::byte*>(::operator new(bytes, std::align_val_t{cache_line})));
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
