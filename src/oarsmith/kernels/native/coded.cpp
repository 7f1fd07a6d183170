// Weights in blocks to 4 bits, and weights in 4 or 8 bits back to floats: out = (values[code] - zero) * scale, with a scale (and a zero) for each run of
// `group` columns of a row. Two 4-bit codes lie in a byte, the first in the upper half.
#include <vector>

#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_LOOKUP
#include <immintrin.h>

// Sixteen bytes of pairs: their 32 codes, in order.
static inline __m256i codes_of(const uint8_t* pairs) {
  __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)), mask = _mm_set1_epi8(15);
  __m128i low = _mm_and_si128(both, mask), high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
}

static inline void look_up(const float* table, __m256i codes, float* o) {
  const __m512 values = _mm512_loadu_ps(table);
  __m512i first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
  __m512i second = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
  _mm512_storeu_ps(o, _mm512_permutexvar_ps(first, values));
  _mm512_storeu_ps(o + 16, _mm512_permutexvar_ps(second, values));
}

static inline void look_up(const bf16* table, __m256i codes, bf16* o) {
  const __m512i values = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  _mm512_storeu_si512(o, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), values));
}
#endif

// `size` codes through a table of sixteen values.
template <class T>
static inline void look_up(const T* table, const uint8_t* pairs, T* o, int64_t size) {
  int64_t i = 0;
#ifdef HAS_LOOKUP
  for (; i + 32 <= size; i += 32) look_up(table, codes_of(pairs + i / 2), o + i);
#endif
  for (; i + 2 <= size; i += 2) {
    o[i] = table[pairs[i / 2] >> 4];
    o[i + 1] = table[pairs[i / 2] & 15];
  }
  if (i < size) o[i] = table[pairs[i / 2] >> 4];
}

// Columns [first, last) of all rows; where codes are of 4 bits, `first` and `group` are even.
template <class T, int BITS>
static void decode(const uint8_t* codes, const float* values, const float* scale, const uint8_t* zero, T* out,
                   int64_t rows, int64_t stride, int64_t groups, int64_t group, int64_t first, int64_t last) {
  const int64_t width = last - first;
#pragma omp parallel for schedule(static) if (rows * width > SERIAL)
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = codes + r * stride;
    T* o = out + r * width;
    for (int64_t g = first / group, start = first; start < last; ++g) {
      const int64_t size = std::min((g + 1) * group, last) - start;
      const float s = scale[r * groups + g], z = zero ? static_cast<float>(zero[r * groups + g]) : 0.0f;
      if (BITS == 4) {
        T table[16];
#pragma omp simd
        for (int c = 0; c < 16; ++c) store(table + c, (values[c] - z) * s);
        look_up(table, row + start / 2, o, size);
      } else {
        const uint8_t* own = row + start;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) store(o + i, (values[own[i]] - z) * s);
      }
      o += size;
      start += size;
    }
  }
}

// Blocks of a row divided by their largest magnitude, each number then the place in `codes` of the nearest of sixteen
// values: as many as there are of the fifteen `borders` between them, ascending, that lie below it. Pairs as above.
template <class T>
static void encode(const T* x, const float* borders, const uint8_t* codes, uint8_t* pairs, float* absmax, int64_t rows,
                   int64_t width, int64_t block) {
  const int64_t blocks = (width + block - 1) / block, stride = (width + 1) / 2;
#pragma omp parallel if (rows * width > SERIAL)
  {
    std::vector<int32_t> counts(block);
    std::vector<float> buffer(block);
    int32_t* places = counts.data();
    float* scaled = buffer.data();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = 0; b < blocks; ++b) {
        const T* own = x + r * width + b * block;
        const int64_t size = std::min(block, width - b * block);
        // Magnitudes of floats are in the order of their bits, where what is not finite comes last.
        uint32_t highest = 0;
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < size; ++i) {
          float v = load(own + i);
          uint32_t bits;
          std::memcpy(&bits, &v, 4);
          bits &= 0x7fffffffu;
          highest = bits > highest ? bits : highest;
        }
        float top;
        std::memcpy(&top, &highest, 4);
        absmax[r * blocks + b] = top;
        const float inverse = 1.0f / (top > 1e-38f ? top : 1e-38f);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          scaled[i] = load(own + i) * inverse;
          places[i] = 0;
        }
        for (int k = 0; k < 15; ++k) {
          const float border = borders[k];
#pragma omp simd
          for (int64_t i = 0; i < size; ++i) places[i] += scaled[i] > border;
        }
        uint8_t* o = pairs + r * stride + b * block / 2;
        for (int64_t i = 0; i < size; i += 2)
          o[i / 2] = static_cast<uint8_t>(codes[places[i]] << 4 | (i + 1 < size ? codes[places[i + 1]] : 0));
      }
  }
}

#define EXPORT(T, suffix)                                                                                                \
  extern "C" void decode4_##suffix(const uint8_t* codes, const float* values, const float* scale, const uint8_t* zero,   \
                                   T* out, int64_t rows, int64_t stride, int64_t groups, int64_t group, int64_t first,   \
                                   int64_t last) {                                                                       \
    decode<T, 4>(codes, values, scale, zero, out, rows, stride, groups, group, first, last);                             \
  }                                                                                                                      \
  extern "C" void decode8_##suffix(const uint8_t* codes, const float* values, const float* scale, const uint8_t* zero,   \
                                   T* out, int64_t rows, int64_t stride, int64_t groups, int64_t group, int64_t first,   \
                                   int64_t last) {                                                                       \
    decode<T, 8>(codes, values, scale, zero, out, rows, stride, groups, group, first, last);                             \
  }                                                                                                                      \
  extern "C" void encode4_##suffix(const T* x, const float* borders, const uint8_t* codes, uint8_t* pairs,               \
                                   float* absmax, int64_t rows, int64_t width, int64_t block) {                          \
    encode<T>(x, borders, codes, pairs, absmax, rows, width, block);                                                     \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
