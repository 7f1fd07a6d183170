// Brings bf16 matrices into the forms that `product` reads. What lies beyond a matrix counts as zeros.
// Columns of all matrices here are a multiple of 16.
#pragma once
#include "bf16_products.h"

#ifdef HAS_BF16_PRODUCTS

// Sixteen rows of sixteen 32-bit words, transposed.
static inline void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0x88);
      y[i + 4 + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

// Rows 2p and 2p + 1 of x[rows, columns], 16 columns of them from `column`, as pairs.
static inline __m512i row_pairs(const bf16* x, int64_t row, int64_t rows, int64_t p, int64_t column) {
  __m512i pairs = _mm512_setzero_si512();
  const bf16* low = x + 2 * p * row + column;
  if (2 * p < rows) pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  if (2 * p + 1 < rows) {
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + row));
    pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  return pairs;
}

// x[rows, columns] itself: out[row, column] for rows up to a multiple of 16 and columns up to one of 32.
static void copy_rows(const bf16* x, int64_t row, int64_t rows, int64_t columns, bf16* out, int64_t out_row) {
  for (int64_t r = 0; r < (rows + 15) / 16 * 16; ++r)
    for (int64_t i = 0; i < (columns + 31) / 32 * 32; i += 16) {
      __m256i some = _mm256_setzero_si256();
      if (r < rows && i < columns) some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + r * row + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * out_row + i), some);
    }
}

// Pairs along the rows of x[rows, columns]: pairs[p, column] for p < padded / 2.
static void pair_rows(const bf16* x, int64_t row, int64_t rows, int64_t columns, int64_t padded, uint32_t* pairs,
                      int64_t pair_row) {
  for (int64_t p = 0; p < padded / 2; ++p)
    for (int64_t i = 0; i < columns; i += 16)
      _mm512_storeu_si512(pairs + p * pair_row + i, row_pairs(x, row, rows, p, i));
}

// The same, transposed: pairs[column, p] for p < padded / 2; padded is a multiple of 32.
static void pair_rows_transposed(const bf16* x, int64_t row, int64_t rows, int64_t columns, int64_t padded,
                                 uint32_t* pairs, int64_t pair_row) {
  for (int64_t p = 0; p < padded / 2; p += 16)
    for (int64_t i = 0; i < columns; i += 16) {
      __m512i block[16];
      for (int64_t j = 0; j < 16; ++j) block[j] = row_pairs(x, row, rows, p + j, i);
      transpose(block);
      for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(pairs + (i + j) * pair_row + p, block[j]);
    }
}

// Pairs along the columns of x[rows, columns], transposed: pairs[p, row] for rows < padded, a multiple of 16, and
// columns up to a multiple of 32.
static void pair_columns(const bf16* x, int64_t row, int64_t rows, int64_t columns, int64_t padded, uint32_t* pairs,
                         int64_t pair_row) {
  for (int64_t p = 0; 2 * p < columns; p += 16) {
    __mmask16 inside = columns - 2 * p < 32 ? 0xff : 0xffff;
    for (int64_t r = 0; r < padded; r += 16) {
      __m512i block[16];
      for (int64_t j = 0; j < 16; ++j)
        block[j] = r + j < rows ? _mm512_maskz_loadu_epi32(inside, x + (r + j) * row + 2 * p) : _mm512_setzero_si512();
      transpose(block);
      for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(pairs + (p + j) * pair_row + r, block[j]);
    }
  }
}

// x[rows, columns] transposed and rounded to bf16: out[column, row] for column < columns; rows is a multiple of 16.
static void round_transposed(const float* x, int64_t row, int64_t rows, int64_t columns, bf16* out, int64_t out_row) {
  for (int64_t i = 0; i < columns; i += 16)
    for (int64_t r = 0; r < rows; r += 16) {
      __m512i block[16];
      for (int64_t j = 0; j < 16; ++j) block[j] = _mm512_loadu_si512(x + (r + j) * row + i);
      transpose(block);
      for (int64_t j = 0; j < std::min<int64_t>(16, columns - i); ++j)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + j) * out_row + r),
                            (__m256i)_mm512_cvtneps_pbh((__m512)block[j]));
    }
}

#endif
