// Small bf16 matrix products with fp32 sums, for tiles that stay in a core's cache.
// Two bf16 along the summed dimension make a 32-bit pair, the unit of both instructions there are: the dot product of
// pairs (AVX512_BF16) and, on CPUs that have it, the product of tiles of 16 rows (AMX). Compilers find neither by
// themselves, so this file and the two for its operands (bf16_packs.h, bf16_rows.h) have intrinsics; no other has.
#pragma once
#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_BF16_PRODUCTS 1
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

// A 32-bit look at two bf16 that were written one by one; without the attribute the compiler may read before they are.
typedef uint32_t Pair __attribute__((__may_alias__));

// One R x 16C piece of c.
template <int R, int C>
static void piece(const Pair* a, int64_t a_row, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t pairs,
                  bool add) {
  __m512 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < C; ++n) sum[r][n] = add ? _mm512_loadu_ps(c + r * c_row + 16 * n) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[C];
    for (int n = 0; n < C; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + p * b_row + 16 * n);
    for (int r = 0; r < R; ++r) {
      __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_row + p]));
      for (int n = 0; n < C; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], left, right[n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < C; ++n) _mm512_storeu_ps(c + r * c_row + 16 * n, sum[r][n]);
}

using Piece = void (*)(const Pair*, int64_t, const Pair*, int64_t, float*, int64_t, int64_t, bool);
#define PIECES(R) {piece<R, 1>, piece<R, 2>, piece<R, 3>, piece<R, 4>}
static const Piece ALL_PIECES[6][4] = {PIECES(1), PIECES(2), PIECES(3), PIECES(4), PIECES(5), PIECES(6)};

#ifdef HAS_TILES

// Linux lets a process use tiles after it asked, for good.
static bool ask_for_tiles() {
  const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
static const bool USE_TILES = ask_for_tiles();

// Eight tiles of 16 rows of 64 bytes, for the calling thread, while this lives.
struct Tiles {
  Tiles() {
    if (!USE_TILES) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (USE_TILES) _tile_release();
  }
};

// One 16R x 16C piece of c: tiles 0 to 3 are c's, 4 and 5 a's, 6 and 7 b's.
template <int R, int C>
static void tile_piece(const Pair* a, int64_t a_row, const Pair* b, int64_t b_row, float* c, int64_t c_row,
                       int64_t pairs, bool add) {
  const int64_t a_bytes = 4 * a_row, b_bytes = 4 * b_row, c_bytes = 4 * c_row;
  float* below = c + 16 * c_row;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (C > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (R > 1) _tile_loadd(2, below, c_bytes);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t p = 0; p < pairs; p += 16) {
    _tile_loadd(4, a + p, a_bytes);
    _tile_loadd(6, b + p * b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b + p * b_row + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a + 16 * a_row + p, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (C > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (R > 1) _tile_stored(2, below, c_bytes);
  if constexpr (R > 1 && C > 1) _tile_stored(3, below + 16, c_bytes);
}

static const Piece TILE_PIECES[2][2] = {{tile_piece<1, 1>, tile_piece<1, 2>}, {tile_piece<2, 1>, tile_piece<2, 2>}};

#else
static const bool USE_TILES = false;
struct Tiles {
  Tiles() {}
};
#endif

// c[rows, columns] (+)= sum over p of a[row, p] b[p, column], a and b of pairs; rows, columns and pairs are multiples
// of 16. The calling thread holds `Tiles`. Pieces of 6 x 64 sums fill the 32 registers, those of 32 x 32 the tiles.
static inline void product(int64_t rows, int64_t columns, int64_t pairs, const void* left, int64_t a_row,
                           const uint32_t* right, int64_t b_row, float* c, int64_t c_row, bool add) {
  const Pair *a = static_cast<const Pair*>(left), *b = right;
#ifdef HAS_TILES
  if (USE_TILES) {
    __asm__ volatile("" ::: "memory");  // GCC does not tell itself that a tile load reads memory
    for (int64_t n = 0; n < columns; n += 32)
      for (int64_t m = 0; m < rows; m += 32)
        TILE_PIECES[rows - m > 16][columns - n > 16](a + m * a_row, a_row, b + n, b_row, c + m * c_row + n, c_row,
                                                     pairs, add);
    return;
  }
#endif
  for (int64_t n = 0; n < columns; n += 64) {
    int64_t wide = std::min<int64_t>(4, (columns - n) / 16);
    for (int64_t m = 0, high; m < rows; m += high) {
      int64_t pieces = (rows - m + 5) / 6;
      high = (rows - m + pieces - 1) / pieces;  // even, for a last piece of one or two rows would wait for its own sums
      ALL_PIECES[high - 1][wide - 1](a + m * a_row, a_row, b + n, b_row, c + m * c_row + n, c_row, pairs, add);
    }
  }
}

#endif
