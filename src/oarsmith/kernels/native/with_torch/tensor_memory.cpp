// Memory of large CPU tensors. Freed blocks are kept for reuse, yet what is in use and kept together stays near the most
// that was ever in use.
// PyTorch takes its tensors from glibc's posix_memalign, which (before glibc 2.38) asks for more than it hands out: a
// block does not fit into the hole that one of its own size left, and a training run grows by a gradient's size a step.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

const size_t LARGE = 1 << 20;      // bytes from which a block is ours
const size_t PAGE = 4096;
const size_t HUGE = 2 << 20;       // a large page; from HUGE_FROM on blocks consist of them
const size_t HUGE_FROM = 8 << 20;
const size_t SLACK = 32 << 20;     // what may be kept at least

struct Block {
  char* data;
  size_t size;
};

class TensorMemory final : public c10::Allocator {
 public:
  TensorMemory() : small_(c10::GetDefaultCPUAllocator()) {}

  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes < LARGE ? small_->raw_allocate(bytes) : take(bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  void sizes(int64_t* out) {
    std::lock_guard<std::mutex> guard(mutex_);
    out[0] = in_use_, out[1] = kept_, out[2] = most_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  using Kept = std::list<Block>;

  static void release(void* data);

  // A sixteenth of its size at most is lost to rounding, so that blocks of nearly one size can replace each other.
  static size_t rounded(size_t bytes) {
    size_t step = size_t(1) << (63 - __builtin_clzll(bytes));
    step = std::max(step / 16, bytes < HUGE_FROM ? 16 * PAGE : HUGE);
    return (bytes + step - 1) / step * step;
  }

  void* take(size_t bytes) {
    size_t size = rounded(bytes);
    char* data;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      auto fitting = by_size_.lower_bound(size);
      if (fitting != by_size_.end() && fitting->first <= size + size / 8) {
        Kept::iterator block = fitting->second;
        data = block->data, size = block->size;
        forget(fitting);
      } else {
        size_t most = std::max(most_, in_use_ + size);
        // Oldest first: what has lain longest fits least of what is asked for now.
        while (kept_ > 0 && in_use_ + size + kept_ > most + std::max(most / 16, SLACK)) give_back_oldest();
        data = map(size);
        while (data == nullptr && kept_ > 0) give_back_oldest(), data = map(size);
        TORCH_CHECK(data != nullptr, "not enough memory: you tried to allocate ", bytes, " bytes");
      }
      used_[data] = size;
      in_use_ += size;
      most_ = std::max(most_, in_use_);
    }
    c10::profiledCPUMemoryReporter().New(data, size);
    return data;
  }

  // Whether the block is ours; it is then kept.
  bool keep(void* data) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = used_.find(data);
    if (found == used_.end()) return false;
    size_t size = found->second;
    used_.erase(found);
    in_use_ -= size;
    by_size_.emplace(size, order_.insert(order_.end(), {static_cast<char*>(data), size}));
    kept_ += size;
    return true;
  }

  void forget(std::multimap<size_t, Kept::iterator>::iterator entry) {
    kept_ -= entry->first;
    order_.erase(entry->second);
    by_size_.erase(entry);
  }

  void give_back_oldest() {
    Block oldest = order_.front();
    auto [entry, end] = by_size_.equal_range(oldest.size);
    while (entry != end && entry->second != order_.begin()) ++entry;
    forget(entry);
    munmap(oldest.data, oldest.size);
  }

  static char* map(size_t size) {
    size_t align = size < HUGE_FROM ? PAGE : HUGE, whole = size + align - PAGE;
    void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(mapped);
    char* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + align - 1) / align * align);
    if (data > begin) munmap(begin, data - begin);
    if (begin + whole > data + size) munmap(data + size, begin + whole - data - size);
    if (align == HUGE) madvise(data, size, MADV_HUGEPAGE);
    return data;
  }

  c10::Allocator* small_;
  std::mutex mutex_;
  std::unordered_map<void*, size_t> used_;
  Kept order_;  // kept blocks, the oldest first
  std::multimap<size_t, Kept::iterator> by_size_;
  size_t in_use_ = 0, kept_ = 0, most_ = 0;
};

// Never destroyed: tensors outlive static objects.
TensorMemory& memory() {
  static TensorMemory* one = new TensorMemory;
  return *one;
}

void TensorMemory::release(void* data) {
  if (reinterpret_cast<uintptr_t>(data) % PAGE == 0 && data != nullptr && memory().keep(data)) {
    c10::profiledCPUMemoryReporter().Delete(data);
  } else {
    memory().small_->raw_deallocate(data);
  }
}

}  // namespace

// Tensors made from now on lie here.
extern "C" void tensor_memory_install() {
  static bool installed = false;
  if (installed) return;
  installed = true;
  TensorMemory& all = memory();
  // A child must not find the lock taken by a thread that it does not have.
  pthread_atfork([] { memory().mutex().lock(); }, [] { memory().mutex().unlock(); }, [] { memory().mutex().unlock(); });
  c10::SetCPUAllocator(&all);
}

// Bytes in use, kept, and the most that were in use.
extern "C" void tensor_memory_sizes(int64_t* out) { memory().sizes(out); }
