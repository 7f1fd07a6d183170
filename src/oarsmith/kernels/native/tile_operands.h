// Operands of matrix products as tiles (AMX) take them, for products too large for a cache. A step is 64 bytes along the
// summed dimension: 32 bf16 or 64 int8. The left one comes in stripes of 32 rows, the right one in panels of 32 columns;
// a stripe or panel is a run of steps, each of two tiles of 16 rows of 64 bytes. A row of a right tile has, of each of 16
// columns, four bytes along the summed dimension. What lies beyond a matrix is zeros.
#pragma once
#include "bf16_packs.h"

#ifdef HAS_TILES

static const int64_t LINE = 64, TILE = 16 * LINE, STEP = 2 * TILE, STRIPE = 32;

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The bits of a line's bytes that are among `bytes`.
static inline __mmask64 first_bytes(int64_t bytes) {
  return bytes >= LINE ? ~0ull : bytes <= 0 ? 0ull : (1ull << bytes) - 1;
}

// Rows [0, rows) of a matrix, of `bytes` bytes each, `row` bytes apart, as stripe.
static void pack_stripe(const uint8_t* x, int64_t row, int64_t rows, int64_t bytes, uint8_t* out) {
  for (int64_t r = 0; r < STRIPE; ++r, out += LINE) {
    uint8_t* to = out;
    for (int64_t at = 0; at < bytes; at += LINE, to += STEP) {
      __m512i line = r < rows ? _mm512_maskz_loadu_epi8(first_bytes(bytes - at), x + r * row + at) : _mm512_setzero_si512();
      _mm512_store_si512(to, line);
    }
  }
}

// Columns that lie in memory as rows of `bytes` bytes, `columns` of at most 32 of them.
static void pack_panel_of_rows(const uint8_t* w, int64_t row, int64_t columns, int64_t bytes, uint8_t* out) {
  for (int64_t at = 0; at < bytes; at += LINE)
    for (int64_t half = 0; half < 2; ++half, out += TILE) {
      __m512i block[16];
      for (int64_t j = 0; j < 16; ++j)
        block[j] = 16 * half + j < columns
                       ? _mm512_maskz_loadu_epi8(first_bytes(bytes - at), w + (16 * half + j) * row + at)
                       : _mm512_setzero_si512();
      transpose(block);
      for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(out + j * LINE, block[j]);
    }
}

// Columns that lie in memory as such, of bf16: w[rows, columns] with `row` numbers between rows, at most 32 columns.
static void pack_panel(const bf16* w, int64_t row, int64_t rows, int64_t columns, uint8_t* out) {
  for (int64_t at = 0; at < rows; at += 32)
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t p = 0; p < 16; ++p, out += LINE) {
        const int64_t left = columns - 16 * half, r = at + 2 * p;
        const __mmask16 inside = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
        const bf16* from = w + r * row + 16 * half;
        const __m256i low = _mm256_maskz_loadu_epi16(r < rows ? inside : 0, from);
        const __m256i high = _mm256_maskz_loadu_epi16(r + 1 < rows ? inside : 0, from + row);
        const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_store_si512(out, pairs);
      }
}

// The same of int8.
static void pack_panel(const int8_t* w, int64_t row, int64_t rows, int64_t columns, uint8_t* out) {
  for (int64_t at = 0; at < rows; at += 64)
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t q = 0; q < 16; ++q, out += LINE) {
        const int64_t left = columns - 16 * half;
        const __mmask16 inside = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
        __m128i x[4];
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t r = at + 4 * q + i;
          x[i] = _mm_maskz_loadu_epi8(r < rows ? inside : 0, w + r * row + 16 * half);
        }
        const __m128i low = _mm_unpacklo_epi8(x[0], x[1]), high = _mm_unpackhi_epi8(x[0], x[1]);
        const __m128i low_2 = _mm_unpacklo_epi8(x[2], x[3]), high_2 = _mm_unpackhi_epi8(x[2], x[3]);
        __m128i* to = reinterpret_cast<__m128i*>(out);
        _mm_store_si128(to, _mm_unpacklo_epi16(low, low_2));
        _mm_store_si128(to + 1, _mm_unpackhi_epi16(low, low_2));
        _mm_store_si128(to + 2, _mm_unpacklo_epi16(high, high_2));
        _mm_store_si128(to + 3, _mm_unpackhi_epi16(high, high_2));
      }
}

#endif
