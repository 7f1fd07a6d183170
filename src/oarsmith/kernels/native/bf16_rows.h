// Rows of attention scores to probabilities and their gradients in bf16. Written out, because sums, exponentials and
// 16-bit stores in one loop are what GCC 12 gets wrong or does not vectorise. Widths are a multiple of 32.
#pragma once
#include "bf16_products.h"

#ifdef HAS_BF16_PRODUCTS

// Interleaves the two halves of 32 numbers of 16 bits.
alignas(64) static const uint16_t INTERLEAVE[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// 2^y for y < 128, relative error below 3e-7; 0 below -126, a NaN stays one.
static inline __m512 power_of_two(__m512 y) {
  __mmask16 inside = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  __m512i whole = _mm512_cvtps_epi32(y);
  __m512 f = _mm512_sub_ps(y, _mm512_cvtepi32_ps(whole));
  __m512 p = _mm512_set1_ps(1.3264727e-3f);  // least largest relative error on [-1/2, 1/2]: 1e-7
  for (float next : {9.6715126e-3f, 5.5507337e-2f, 2.4022242e-1f, 6.9314698e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(next));
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(inside, _mm512_castps_si512(p), _mm512_slli_epi32(whole, 23)));
}

static inline float power_of_two(float y) { return _mm512_cvtss_f32(power_of_two(_mm512_set1_ps(y))); }

// Puts `other` in x[0, wide) outside [from, to).
static inline void keep(float* x, int64_t from, int64_t to, int64_t wide, float other) {
  if (from == 0 && to == wide) return;
  const __m512i first = _mm512_set1_epi32(static_cast<int>(from)), stop = _mm512_set1_epi32(static_cast<int>(to));
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < wide; i += 16, at = _mm512_add_epi32(at, _mm512_set1_epi32(16))) {
    __mmask16 outside = _mm512_cmplt_epi32_mask(at, first) | _mm512_cmpge_epi32_mask(at, stop);
    _mm512_mask_storeu_ps(x + i, outside, _mm512_set1_ps(other));
  }
}

// fp32 values times a factor, rounded to bf16; columns a multiple of 16.
static inline void round_row(const float* x, int64_t columns, float factor, bf16* out) {
  for (int64_t i = 0; i < columns; i += 16) {
    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(y));
  }
}

static inline void multiply(float* x, int64_t columns, float factor) {
  for (int64_t i = 0; i < columns; i += 16)
    _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
}

// The largest of x, NaNs left out.
static inline float largest_of(const float* x, int64_t wide) {
  __m512 a = _mm512_set1_ps(-INFINITY), b = a;
  for (int64_t i = 0; i < wide; i += 32) {
    a = _mm512_max_ps(_mm512_loadu_ps(x + i), a);
    b = _mm512_max_ps(_mm512_loadu_ps(x + i + 16), b);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

// out = 2^(scale * x - less) in bf16; returns the sum before rounding.
static inline float powers_of_two(const float* x, int64_t wide, float scale, float less, bf16* out) {
  const __m512 factor = _mm512_set1_ps(scale), minus = _mm512_set1_ps(less);
  __m512 a = _mm512_setzero_ps(), b = a;
  for (int64_t i = 0; i < wide; i += 32) {
    __m512 low = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(x + i), factor, minus));
    __m512 high = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(x + i + 16), factor, minus));
    a = _mm512_add_ps(a, low);
    b = _mm512_add_ps(b, high);
    _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
}

// Two rows of scores x and of the gradients dx of probabilities.
struct TwoRows {
  const float *x[2], *dx[2];
  float lse[2], delta[2];
};

// p = 2^(scale_2 * x - lse) and ds = scale * p * (dx - delta) in bf16, as pairs of the two rows; ds also row by row.
static inline void differentiate(const TwoRows& r, int64_t wide, float scale_2, float scale, uint32_t* p_pairs,
                                 uint32_t* ds_pairs, bf16* ds, int64_t ds_row) {
  const __m512i interleave = _mm512_load_si512(INTERLEAVE);
  const __m512 factor_2 = _mm512_set1_ps(scale_2), factor = _mm512_set1_ps(scale);
  const __m512 lse[2] = {_mm512_set1_ps(r.lse[0]), _mm512_set1_ps(r.lse[1])};
  const __m512 delta[2] = {_mm512_set1_ps(scale * r.delta[0]), _mm512_set1_ps(scale * r.delta[1])};
  for (int64_t i = 0; i < wide; i += 16) {
    __m512 p[2], d[2];
    for (int h = 0; h < 2; ++h) {
      p[h] = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(r.x[h] + i), factor_2, lse[h]));
      d[h] = _mm512_mul_ps(p[h], _mm512_fmsub_ps(_mm512_loadu_ps(r.dx[h] + i), factor, delta[h]));
    }
    __m512i both_p = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]), both_d = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]);
    _mm512_storeu_si512(p_pairs + i, _mm512_permutexvar_epi16(interleave, both_p));
    _mm512_storeu_si512(ds_pairs + i, _mm512_permutexvar_epi16(interleave, both_d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + i), _mm512_castsi512_si256(both_d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + ds_row + i), _mm512_extracti64x4_epi64(both_d, 1));
  }
}

#endif
