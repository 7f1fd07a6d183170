// Reads one block of memory again and again, in 2 MB pages, each thread its own share; returns the best pass's bytes/s.
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

typedef uint64_t line __attribute__((vector_size(64)));
constexpr int64_t PAGE = 2 << 20;

// Eight sums that do not wait for each other: the loads are the limit, not the additions.
uint64_t sum(const line* data, int64_t count) {
    line sums[8] = {};
    for (int64_t at = 0; at + 8 <= count; at += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += data[at + lane];
    line all = {};
    for (const line& one : sums) all += one;
    uint64_t total = 0;
    for (int lane = 0; lane < 8; ++lane) total += all[lane];
    return total;
}

}  // namespace

extern "C" double read_rate(int64_t num_bytes, int num_threads, int num_passes) {
    const int64_t share = (num_bytes / num_threads + PAGE - 1) / PAGE * PAGE;
    const int64_t size = share * num_threads + PAGE;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return -1.0;
    madvise(memory, size, MADV_HUGEPAGE);
    auto* begin = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE);
    std::barrier together(num_threads);
    std::vector<uint64_t> found(num_threads);
    double best = 0.0;
    auto work = [&](int thread) {
        uint8_t* mine = begin + thread * share;
        std::memset(mine, thread + 1, share);
        for (int pass = 0; pass < num_passes; ++pass) {
            together.arrive_and_wait();
            const auto start = std::chrono::steady_clock::now();
            found[thread] += sum(reinterpret_cast<const line*>(mine), share / sizeof(line));
            together.arrive_and_wait();
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            if (thread == 0) best = std::max(best, share * num_threads / seconds.count());
        }
    };
    std::vector<std::thread> threads;
    for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(work, thread);
    for (std::thread& one : threads) one.join();
    uint64_t total = 0;
    for (uint64_t one : found) total += one;
    munmap(memory, size);
    // So that no compiler leaves the reading out.
    return total == 0 ? 0.0 : best;
}
