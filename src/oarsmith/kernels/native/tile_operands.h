// Operands of matrix products as tiles (AMX) take them, for products too large for a cache. A step is 64 bytes along
// the summed dimension: 32 bf16 or 64 int8. The left one comes in stripes of 32 rows, the right one in panels of 32
// columns; a stripe or panel is a run of steps, each of two tiles of 16 rows of 64 bytes. A row of a right tile has, of
// each of 16 columns, four bytes along the summed dimension. What lies beyond a matrix is zeros.
#pragma once
#include "bf16_packs.h"

#ifdef HAS_TILES

static const int64_t LINE = 64, TILE = 16 * LINE, STEP = 2 * TILE, STRIPE = 32;

// The lower halves of two registers of 32 numbers of 16 bits, by turns.
alignas(64) static const uint16_t INTERLEAVED[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

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
      const __mmask64 inside = r < rows ? first_bytes(bytes - at) : 0;
      _mm512_store_si512(to, _mm512_maskz_loadu_epi8(inside, x + r * row + at));
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
  const __m512i count = _mm512_load_si512(INTERLEAVED), other = _mm512_add_epi16(count, _mm512_set1_epi16(16));
  const __mmask32 inside = static_cast<__mmask32>(first_bytes(columns));
  for (int64_t r = 0; r < divided_up(rows, 32) * 32; r += 2, out += LINE) {
    if (r > 0 && r % 32 == 0) out += TILE;
    const __m512i low = _mm512_maskz_loadu_epi16(r < rows ? inside : 0, w + r * row);
    const __m512i high = _mm512_maskz_loadu_epi16(r + 1 < rows ? inside : 0, w + (r + 1) * row);
    _mm512_store_si512(out, _mm512_permutex2var_epi16(low, count, high));
    _mm512_store_si512(out + TILE, _mm512_permutex2var_epi16(low, other, high));
  }
}

// The same of int8. Halves of registers are the columns of the two tiles.
static void pack_panel(const int8_t* w, int64_t row, int64_t rows, int64_t columns, uint8_t* out) {
  const __mmask32 inside = static_cast<__mmask32>(first_bytes(columns));
  for (int64_t r = 0; r < divided_up(rows, 64) * 64; r += 4, out += LINE) {
    if (r > 0 && r % 64 == 0) out += TILE;
    __m256i x[4];
    for (int64_t i = 0; i < 4; ++i) x[i] = _mm256_maskz_loadu_epi8(r + i < rows ? inside : 0, w + (r + i) * row);
    const __m256i low = _mm256_unpacklo_epi8(x[0], x[1]), high = _mm256_unpackhi_epi8(x[0], x[1]);
    const __m256i low_2 = _mm256_unpacklo_epi8(x[2], x[3]), high_2 = _mm256_unpackhi_epi8(x[2], x[3]);
    const __m256i quads[4] = {_mm256_unpacklo_epi16(low, low_2), _mm256_unpackhi_epi16(low, low_2),
                              _mm256_unpacklo_epi16(high, high_2), _mm256_unpackhi_epi16(high, high_2)};
    for (int64_t i = 0; i < 4; ++i) {
      _mm_store_si128(reinterpret_cast<__m128i*>(out) + i, _mm256_castsi256_si128(quads[i]));
      _mm_store_si128(reinterpret_cast<__m128i*>(out + TILE) + i, _mm256_extracti128_si256(quads[i], 1));
    }
  }
}

#endif
