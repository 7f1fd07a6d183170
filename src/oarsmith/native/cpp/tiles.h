// Products of rows of bf16 inputs with AMX's tiles: 16 rows of 32 bf16, times 32 columns of a block, which lie in
// memory as a tile wants them (matrix.h). Weights of 8 and 4 bits become bf16 on the way, between the products: on an Emerald
// Rapids a product of tiles takes 17 cycles, in which 24 other operations on vectors can be done.
#pragma once
#include "inputs.h"
#include "unpack.h"

#ifdef HAS_TILES

static constexpr int64_t TILE_BYTES = 16 * LINE;  // 32 columns of 16 rows or of a block, in bf16

// Eight tiles of 16 rows of 64 bytes, for the calling thread, while this lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// The sums of 16 T rows and two blocks are the tiles 0 to 3; of memory they take [16 T, 32].
template <int T>
static ALWAYS_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (T > 1) _tile_zero(2);
  if constexpr (T > 1) _tile_zero(3);
}
template <int T>
static ALWAYS_INLINE void load_sums(const float* sums) {
  constexpr int64_t BYTES = 2 * LINE, BELOW = 16 * PAIR;
  _tile_loadd(0, sums, BYTES);
  _tile_loadd(1, sums + BLOCK, BYTES);
  if constexpr (T > 1) _tile_loadd(2, sums + BELOW, BYTES);
  if constexpr (T > 1) _tile_loadd(3, sums + BELOW + BLOCK, BYTES);
}
template <int T>
static ALWAYS_INLINE void store_sums(float* sums) {
  constexpr int64_t BYTES = 2 * LINE, BELOW = 16 * PAIR;
  _tile_stored(0, sums, BYTES);
  _tile_stored(1, sums + BLOCK, BYTES);
  if constexpr (T > 1) _tile_stored(2, sums + BELOW, BYTES);
  if constexpr (T > 1) _tile_stored(3, sums + BELOW + BLOCK, BYTES);
}

// Adds the products of a group of columns; between(i) with i < 2 T is other work to do after each of them.
template <int T, class Between>
static ALWAYS_INLINE void add_products(const uint8_t* inputs, const uint8_t* left, const uint8_t* right,
                                       Between&& between) {
  _tile_loadd(4, inputs, LINE);
  _tile_loadd(6, left, LINE);
  _tile_dpbf16ps(0, 4, 6);
  between(0);
  _tile_loadd(7, right, LINE);
  _tile_dpbf16ps(1, 4, 7);
  between(1);
  if constexpr (T > 1) {
    _tile_loadd(5, inputs + TILE_BYTES, LINE);
    _tile_dpbf16ps(2, 5, 6);
    between(2);
    _tile_dpbf16ps(3, 5, 7);
    between(3);
  }
}

// GCC does not tell itself that tiles are read from memory and written to it.
static ALWAYS_INLINE void memory_changed() { __asm__ volatile("" ::: "memory"); }

// Makes a group of columns of a pair of blocks ready to be multiplied, an eighth at a time. bf16 is ready, and only
// fetched: for few rows what comes next into L1, for many what comes later into L2.
template <Format FORMAT, bool MANY>
class Preparation {
 public:
  ALWAYS_INLINE void begin(const uint8_t* left, const uint8_t* right, int64_t group, uint8_t* out) {
    unpacking_[0].begin(left, group, out);
    unpacking_[1].begin(right, group, out + TILE_BYTES);
  }
  ALWAYS_INLINE void eighth(int i) const { unpacking_[i / 4].quarter(i % 4); }

 private:
  Unpacking<FORMAT> unpacking_[2];
};
template <bool MANY>
class Preparation<BF16, MANY> {
 public:
  ALWAYS_INLINE void begin(const uint8_t* left, const uint8_t* right, int64_t group, uint8_t*) {
    tiles_[0] = left + group * TILE_BYTES;
    tiles_[1] = right + group * TILE_BYTES;
  }
  ALWAYS_INLINE void eighth(int i) const {
#pragma GCC unroll 4
    for (int line = i % 4 * 4; line < i % 4 * 4 + 4; ++line)
      if constexpr (MANY)
        __builtin_prefetch(tiles_[i / 4] + line * LINE, 0, 2);
      else
        fetch_ahead(tiles_[i / 4] + line * LINE);
  }

 private:
  const uint8_t* tiles_[2];
};

#endif
