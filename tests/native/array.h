// An array whose neighbourhood may not be touched.
//
// It ends where a page without access begins, so that any instruction that reaches past the end faults, also a
// masked load, which AddressSanitizer does not look at. What lies before its first element is poisoned in
// builds with AddressSanitizer, as far as that can tell apart: in pieces of 8 bytes. Its elements are not
// aligned to more than their own size.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <limits>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

template <class Real>
class Array {
 public:
  Array() = default;
  // Full of NaN, so that an element that is read before it is written shows.
  explicit Array(std::ptrdiff_t count) : count_(count) {
    const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = sizeof(Real) * std::size_t(count);
    room_ = (bytes + page - 1) / page * page;
    void* mapped =
        mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<std::byte*>(mapped);
    if (mprotect(memory_ + room_, page, PROT_NONE)) throw std::bad_alloc();
    room_and_guard_ = room_ + page;
    first_ = reinterpret_cast<Real*>(memory_ + (room_ - bytes));
    for (Real& element : *this) element = std::numeric_limits<Real>::quiet_NaN();
    ASAN_POISON_MEMORY_REGION(memory_, room_ - bytes);
  }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(first_, other.first_);
    std::swap(count_, other.count_);
    std::swap(room_, other.room_);
    std::swap(room_and_guard_, other.room_and_guard_);
    return *this;
  }
  ~Array() {
    if (!memory_) return;
    ASAN_UNPOISON_MEMORY_REGION(memory_, room_);
    munmap(memory_, room_and_guard_);
  }

  Real* data() { return first_; }
  const Real* data() const { return first_; }
  std::ptrdiff_t size() const { return count_; }
  Real* begin() { return first_; }
  Real* end() { return first_ + count_; }
  const Real* begin() const { return first_; }
  const Real* end() const { return first_ + count_; }
  Real& operator[](std::ptrdiff_t n) { return first_[n]; }
  Real operator[](std::ptrdiff_t n) const { return first_[n]; }

 private:
  std::byte* memory_ = nullptr;
  Real* first_ = nullptr;
  std::ptrdiff_t count_ = 0;
  std::size_t room_ = 0, room_and_guard_ = 0;
};
