// A team of threads that works through a step together. Members meet many times a millisecond: they wait spinning, and
// sleep only when it takes long, so that a busy machine gets its processors back.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void pause_briefly() { _mm_pause(); }
#elif defined(__aarch64__)
static inline void pause_briefly() { __asm__ volatile("yield"); }
#else
static inline void pause_briefly() {}
#endif

class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int member = 1; member < size; ++member) threads_.emplace_back([this, member] { serve(member); });
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  ~Team() {
    work_ = nullptr;
    begin();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Runs work(member) on all members at once, the caller being the first; returns when all are done.
  void run(const std::function<void(int)>& work) {
    work_ = &work;
    begin();
    work(0);
    meet();
  }

  // Within `run`: waits until all members are here.
  void meet() {
    if (size_ == 1) {
      ticket_.store(0, std::memory_order_relaxed);
      return;
    }
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      ticket_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
    } else {
      wait_for_change(round_, round);
    }
  }

  // Numbers 0, 1, 2, ..., each given to one member, until the next meeting.
  int64_t take() { return ticket_.fetch_add(1, std::memory_order_relaxed); }

 private:
  void begin() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }

  void serve(int member) {
    for (uint32_t epoch = 0;; ++epoch) {
      wait_for_change(epoch_, epoch);
      if (work_ == nullptr) return;
      (*work_)(member);
      meet();
    }
  }

  // Half a millisecond covers what lies between two steps; after that, or when spinning is of no use, it sleeps.
  static void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
    using clock = std::chrono::steady_clock;
    clock::time_point stop{};
    for (int turn = 1; value.load(std::memory_order_acquire) == old; ++turn) {
      pause_briefly();
      if (turn % 256) continue;
      const clock::time_point now = clock::now();
      if (stop == clock::time_point{}) stop = now + std::chrono::microseconds(500);
      if (now < stop) {
        std::this_thread::yield();
      } else {
        value.wait(old, std::memory_order_acquire);
      }
    }
  }

  const int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<uint32_t> epoch_{0}, round_{0};
  std::atomic<int> arrived_{0};
  std::atomic<int64_t> ticket_{0};
};
