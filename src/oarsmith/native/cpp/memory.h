// Memory in pages of 2 MB: a decoder's weights are read once a token, and with pages of 4 KB the look-ups of their
// addresses cost more than half of what the memory could give.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <utility>

class Memory {
 public:
  Memory() = default;
  // Zeros; data() is null where there is no memory. Pages exist from when they are first written.
  explicit Memory(size_t bytes) : mapped_((bytes + 2 * HUGE - 1) / HUGE * HUGE) {
    void* start = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return;
    start_ = static_cast<uint8_t*>(start);
    data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(start) + HUGE - 1) / HUGE * HUGE);
#ifdef MADV_HUGEPAGE
    madvise(data_, mapped_ - HUGE, MADV_HUGEPAGE);
#endif
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() {
    if (start_) munmap(start_, mapped_);
  }
  uint8_t* data() const { return data_; }

 private:
  static constexpr size_t HUGE = size_t{2} << 20;
  void swap(Memory& other) {
    std::swap(mapped_, other.mapped_), std::swap(start_, other.start_), std::swap(data_, other.data_);
  }
  size_t mapped_ = 0;
  uint8_t *start_ = nullptr, *data_ = nullptr;
};
