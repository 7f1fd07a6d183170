// Floats of 8 bits: a sign, 4 bits of exponent, 3 of fraction (E4M3, OCP 8-bit Floating Point Specification 1.0, 5.2).
// There is no infinity; 127 and 255 are NaN. An exponent of 0 means steps of 2^-9. Included after vec.h.
#pragma once
#include "vec.h"

static constexpr float E4M3_MOST = 448.0f;

// The numbers that codes of 0 to 255 stand for; NaN's codes become 480 where they are not looked for.
// Multiplying the bits into place would make numbers without a leading one too, but those cost an x86 100 cycles each.
template <bool NANS>
static ALWAYS_INLINE vec16 from_e4m3(const ivec16& codes) {
  const ivec16 magnitude = codes & every16(127);
  const vec16 usual = bits16<float>(by_part<ivec16>([](auto m) { return (m << 20) + (120 << 23); }, magnitude));
  const vec16 small = convert16<float>(magnitude) * 0x1p-9f;
  vec16 size = where16(magnitude < every16(8), small, usual);
  if constexpr (NANS) size = where16(magnitude == every16(127), all16(NAN), size);
  return bits16<float>(by_part<ivec16>([](auto s, auto u) { return s | (u & 128) << 24; }, bits16<int32_t>(size), codes));
}
static inline float from_e4m3(uint8_t code) { return from_e4m3<true>(every16<int32_t>(code))[0]; }

// The nearest codes, ties to even; what lies outside becomes the largest, NaN stays.
static ALWAYS_INLINE ivec16 to_e4m3(const vec16& x) {
  const vec16 size = min16(abs16(x), all16(E4M3_MOST));
  const ivec16 usual = by_part<ivec16>([](auto u) { return ((u + 0x7ffff + ((u >> 20) & 1)) >> 20) - (120 << 3); },
                                       bits16<int32_t>(size));
  const ivec16 is_small = size < all16(0x1p-6f);
  const ivec16 small = round16(where16(is_small, size * 512.0f, zero16()));
  const ivec16 code = where16(size == size, where16(is_small, small, usual), every16(127));
  return by_part<ivec16>([](auto c, auto u) { return c | (u >> 24 & 128); }, code, bits16<int32_t>(x));
}

#if defined(HAS_AVX512)
// 32 codes, one in the lower half of each 16 bits, as bf16.
static ALWAYS_INLINE __m512i halves_of_e4m3(__m512i codes, __m512i signs) {
  const __m512i small = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(127));
  const __m512i usual = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  const __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  const __m512i size = _mm512_mask_permutexvar_epi16(usual, is_small, magnitude, small);
  return _mm512_ternarylogic_epi32(size, signs, _mm512_set1_epi16(-32768), 0xf8);  // size | (signs & highest)
}

// The four columns of a line of E4M3 as two lines of pairs of bf16. Numbers without a leading one are rare: where a line
// has none, sign and magnitude go to their places in one shift, which brings copies of the sign that are taken away.
static ALWAYS_INLINE void pairs_of_e4m3(__m512i line, __m512i* pairs) {
  if (__builtin_expect(_mm512_test_epi8_mask(line, _mm512_set1_epi8(0x78)) == ~__mmask64{0}, 1)) {
    const __m512i places = _mm512_set1_epi16(static_cast<short>(0x87f0)), bias = _mm512_set1_epi16(120 << 7);
    const auto placed = [&](__m512i upper) __attribute__((always_inline)) {
      return _mm512_add_epi16(_mm512_and_si512(_mm512_srai_epi16(upper, 4), places), bias);
    };
    pairs[0] = placed(_mm512_slli_epi16(line, 8));
    pairs[1] = placed(line);
    return;
  }
  pairs[0] = halves_of_e4m3(line, _mm512_slli_epi16(line, 8));
  pairs[1] = halves_of_e4m3(_mm512_srli_epi16(line, 8), line);
}
#endif
