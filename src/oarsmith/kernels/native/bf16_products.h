// Small bf16 matrix products with fp32 sums, for tiles that stay in a core's cache.
// The one place with intrinsics: compilers do not find the dot product of bf16 pairs (AVX512_BF16) by themselves.
#pragma once
#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define HAS_BF16_PRODUCTS 1
#include <immintrin.h>

// A 32-bit look at two bf16 that were written one by one; without the attribute the compiler may read before they are.
typedef uint32_t Pair __attribute__((__may_alias__));

// One R x 16C tile of c[m, n] (+)= sum_k a[m, k] b[k, n]. Two bf16 along k make a 32-bit pair: pair (m, p) of a lies at
// a[m * a_row + p * a_pair], pair (p, n) of b at b[p * b_pair + n].
template <int R, int C>
static void tile(const Pair* a, int64_t a_row, int64_t a_pair, const uint32_t* b, int64_t b_pair, float* c,
                 int64_t c_row, int64_t pairs, bool add) {
  __m512 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < C; ++n) sum[r][n] = add ? _mm512_loadu_ps(c + r * c_row + 16 * n) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[C];
    for (int n = 0; n < C; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + p * b_pair + 16 * n);
    for (int r = 0; r < R; ++r) {
      __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_row + p * a_pair]));
      for (int n = 0; n < C; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], left, right[n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < C; ++n) _mm512_storeu_ps(c + r * c_row + 16 * n, sum[r][n]);
}

using Tile = void (*)(const Pair*, int64_t, int64_t, const uint32_t*, int64_t, float*, int64_t, int64_t, bool);
#define TILE_ROW(R) {tile<R, 1>, tile<R, 2>, tile<R, 3>, tile<R, 4>}
static const Tile TILES[6][4] = {TILE_ROW(1), TILE_ROW(2), TILE_ROW(3), TILE_ROW(4), TILE_ROW(5), TILE_ROW(6)};

// c[rows, columns] (+)= a b; columns is a multiple of 16. 6 x 64 sums fill the 32 registers.
static inline void product(int64_t rows, int64_t columns, int64_t pairs, const Pair* a, int64_t a_row, int64_t a_pair,
                           const uint32_t* b, int64_t b_pair, float* c, int64_t c_row, bool add) {
  for (int64_t n = 0; n < columns; n += 64) {
    int64_t wide = std::min<int64_t>(4, (columns - n) / 16);
    for (int64_t m = 0; m < rows; m += 6) {
      int64_t high = std::min<int64_t>(6, rows - m);
      TILES[high - 1][wide - 1](a + m * a_row, a_row, a_pair, b + n, b_pair, c + m * c_row + n, c_row, pairs, add);
    }
  }
}

// The pairs of rows 2p and 2p + 1 of x[rows, columns]: pairs[p, column]. A missing last row counts as zeros.
static inline void pair_rows(const bf16* x, int64_t row, int64_t rows, int64_t columns, uint32_t* pairs,
                             int64_t pair_row) {
  for (int64_t p = 0; 2 * p < rows; ++p) {
    const bf16* low = x + 2 * p * row;
    const bf16* high = 2 * p + 1 < rows ? low + row : nullptr;
    uint32_t* out = pairs + p * pair_row;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i)
      out[i] = low[i].bits | (high ? static_cast<uint32_t>(high[i].bits) << 16 : 0u);
  }
}

// Two rows of fp32 values, rounded to bf16, as pairs. A missing second row counts as zeros.
static inline void pair_rounded(const float* low, const float* high, int64_t columns, uint32_t* pairs) {
  bf16 x, y;
  if (high) {
#pragma omp simd private(x, y)
    for (int64_t i = 0; i < columns; ++i) {
      store(&x, low[i]);
      store(&y, high[i]);
      pairs[i] = x.bits | static_cast<uint32_t>(y.bits) << 16;
    }
  } else {
#pragma omp simd private(x)
    for (int64_t i = 0; i < columns; ++i) {
      store(&x, low[i]);
      pairs[i] = x.bits;
    }
  }
}

// The transpose of x[rows, columns] in pairs along its columns: pairs[p, row] for p < columns / 2; zeros up to `padded`.
static inline void pair_columns(const bf16* x, int64_t row, int64_t rows, int64_t columns, uint32_t* pairs,
                                int64_t padded) {
  for (int64_t start = 0; start < padded; start += 16) {
    int64_t stop = std::min(start + 16, rows);
    for (int64_t p = 0; p < columns / 2; ++p) {
      uint32_t* out = pairs + p * padded + start;
      for (int64_t r = start; r < start + 16; ++r) {
        uint32_t pair = 0;
        if (r < stop) std::memcpy(&pair, x + r * row + 2 * p, 4);
        out[r - start] = pair;
      }
    }
  }
}

#endif
