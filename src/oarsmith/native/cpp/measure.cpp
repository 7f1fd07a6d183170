// How fast products are, and what the machine could do: its memory's rate and that of each kind of product.
// Times are processor seconds of the slowest thread, which others' work on a busy machine prolongs least.
#include <time.h>

#include <atomic>
#include <vector>

#include "multiply.h"
#include "pack.h"
#include "tiles.h"

namespace {

double processor_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Runs work(thread) on all threads `repeats` times, beginning together, and writes what the slowest of them took.
template <class Work>
void time_on_threads(int threads, int repeats, double* seconds, Work&& work) {
  std::atomic<int> arrived{0};
  std::vector<std::vector<double>> taken(threads, std::vector<double>(repeats));
  on_threads(threads, threads, [&](int64_t t) {
    for (int r = 0; r < repeats; ++r) {
      arrived.fetch_add(1);
      while (arrived.load() < threads * (r + 1)) std::this_thread::yield();
      const double start = processor_seconds();
      work(t);
      taken[t][r] = processor_seconds() - start;
    }
  });
  for (int r = 0; r < repeats; ++r) {
    seconds[r] = 0;
    for (int t = 0; t < threads; ++t) seconds[r] = std::max(seconds[r], taken[t][r]);
  }
}

volatile float unused = 1.0f;  // results go here, so that they are computed

// What the processor can do without memory, `times` times twelve products; gives their operations.
double vector_products(int64_t times) {
  const vec16 a = all16(unused), b = all16(unused);
  vec16 sums[12] = {};
  for (int64_t t = 0; t < times; ++t)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = fma16(a, b, sums[i]);
  for (const vec16& sum : sums) unused = unused + sum[0];
  return 12.0 * 32 * static_cast<double>(times);
}

double half_products(int64_t times) {
  if (!DOTS_OF_HALVES) return 0;
  const ivec16 a = every16(0x3f803f80 + static_cast<int32_t>(unused));
  vec16 sums[12] = {};
  for (int64_t t = 0; t < times; ++t)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = dot_halves(sums[i], a, 0x3f803f80);
  for (const vec16& sum : sums) unused = unused + sum[0];
  return 12.0 * 64 * static_cast<double>(times);
}

double byte_products(int64_t times) {
  if (!DOTS_OF_BYTES) return 0;
  const ivec16 a = every16(0x01010101 + static_cast<int32_t>(unused));
  DotsOfBytes<INT4> sums[12];
  for (auto& sum : sums) sum.begin(0);
  for (int64_t t = 0; t < times; ++t)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i].add(a, 0x01010101);
  for (const auto& sum : sums) unused = unused + sum.total()[0];
  return 12.0 * 128 * static_cast<double>(times);
}

// With numbers as they are: of zeros, which need less power, a CPU multiplies more.
double tile_products(int64_t times) {
#ifdef HAS_TILES
  if (!tiles_allowed()) return 0;
  const Tiles tiles;
  alignas(64) uint16_t numbers[TILE_BYTES];  // two tiles
  for (int64_t i = 0; i < TILE_BYTES; ++i) numbers[i] = static_cast<uint16_t>(0x3f00 + (i * 2654435761 >> 7 & 0x80ff));
  alignas(64) float sums[32 * PAIR];
  zero_sums<2>();
  for (int64_t t = 0; t < times; ++t) {
    memory_changed();
    const uint8_t* tile = reinterpret_cast<const uint8_t*>(numbers);
    add_products<2>(tile, tile, tile + TILE_BYTES, [](int) {});
  }
  store_sums<2>(sums);
  memory_changed();
  unused = sums[0];
  return 4.0 * 16 * 16 * 64 * static_cast<double>(times);
#else
  return 0 * static_cast<double>(times);
#endif
}

}  // namespace

extern "C" {

// seconds[repeats]: the time to multiply `count` rows by each of `copies` equal matrices that lie behind one another.
// Returns the kind of products, as in native_measure_peak.
int32_t native_measure_multiply(int32_t format, const uint8_t* blocks, int64_t copies, int64_t rows, int64_t columns,
                                int64_t count, int32_t threads, int32_t repeats, double* seconds) {
  const Matrix matrix{static_cast<Format>(format), rows, columns, blocks};
  Inputs inputs;
  inputs.begin(matrix.format, columns, count);
  std::vector<float> x(columns);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < columns; ++c) x[c] = static_cast<float>((r * 31 + c * 17) % 61 - 30) / 30.0f;
    inputs.set_row(r, x.data());
  }
  std::vector<Memory> outputs;
  for (int t = 0; t < threads; ++t) outputs.emplace_back(count * PAIR * sizeof(float));
  time_on_threads(threads, repeats, seconds, [&](int64_t t) {
    float* out = reinterpret_cast<float*>(outputs[t].data());
    for (int64_t copy = 0; copy < copies; ++copy) {
      const Matrix one{matrix.format, rows, columns, blocks + copy * matrix.bytes()};
      multiply(one, inputs, count, one.pairs() * t / threads, one.pairs() * (t + 1) / threads,
               [out](int64_t, int64_t row, const vec16& low, const vec16& high) {
                 store16(out + row * PAIR, low);
                 store16(out + row * PAIR + BLOCK, high);
               });
    }
  });
  return inputs.for_tiles() ? 3 : static_cast<int32_t>(inputs.form());
}

// seconds[repeats]: the time to bring `count` rows into the form for a format.
void native_measure_set_rows(int32_t format, int64_t columns, int64_t count, int32_t repeats, double* seconds) {
  Inputs inputs;
  inputs.begin(static_cast<Format>(format), columns, count);
  std::vector<float> x(columns);
  for (int64_t c = 0; c < columns; ++c) x[c] = static_cast<float>(c % 61 - 30);
  time_on_threads(1, repeats, seconds, [&](int64_t) {
    for (int64_t r = 0; r < count; ++r) inputs.set_row(r, x.data());
  });
}

// seconds[repeats]: the time to read this memory once.
void native_measure_read(const uint8_t* memory, int64_t bytes, int32_t threads, int32_t repeats, double* seconds) {
  const int64_t share = bytes / threads / 256 * 256;
  time_on_threads(threads, repeats, seconds, [&](int64_t t) {
    vec16 sums[4] = {};
    for (const uint8_t* x = memory + share * t; x < memory + share * (t + 1); x += 256)
      for (int i = 0; i < 4; ++i) {
        fetch_ahead(x + i * LINE);
        sums[i] += load16(reinterpret_cast<const float*>(x) + 16 * i);
      }
    unused = sum16(sums[0] + sums[1] + (sums[2] + sums[3]));
  });
}

// seconds[repeats]: the time of products without memory: 0 of fp32, 1 of pairs of bf16, 2 of bytes, 3 of tiles of bf16.
// Returns how many operations that is, on all threads; 0 if the CPU has none such.
double native_measure_peak(int32_t kind, int32_t threads, int32_t repeats, double* seconds) {
  double (*const all[])(int64_t) = {vector_products, half_products, byte_products, tile_products};
  const auto products = all[kind];
  const double operations = products(1);
  if (operations == 0) return 0;
  const int64_t times = static_cast<int64_t>(5e7 / operations);
  time_on_threads(threads, repeats, seconds, [&](int64_t) { products(times); });
  return operations * static_cast<double>(times) * threads;
}
}
