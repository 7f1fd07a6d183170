// Blocks of 8 or 4 bits as blocks of bf16, for the products of tiles.
#pragma once
#include "e4m3.h"
#include "instructions.h"

#ifdef HAS_TILES

// The upper halves of two vectors of floats, as pairs.
static ALWAYS_INLINE __m512i pairs_of(__m512 first, __m512 second) {
  const __m512i upper = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  return _mm512_mask_shuffle_epi8((__m512i)second, 0x3333333333333333, (__m512i)first, upper);
}

// A group of a block in bf16, a quarter at a time. A byte at the right place makes of 1.0 a number between 1 and 2 that
// is linear in it; so one fused product gives the weight.
//
// Its upper half is a bf16, smaller by half a unit on average. So all are made larger by 0.72/256 before, half a unit
// for mantissas of 1.39: then the error is 0.31 units (root mean square; of the nearest bf16 it is 0.29) and 1e-5 on
// average, a weight that is a bf16 stays what it is, and rounding, a third of the operations here, is saved.
template <Format FORMAT>
class Unpacking {
 public:
  ALWAYS_INLINE void begin(const uint8_t* block, int64_t group, uint8_t* out) {
    lines_ = block + (is_bytes(FORMAT) ? int8_lines(group) : int4_lines(group));
    out_ = out;
    const auto load = [&](int64_t place) {
      return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(block + place)));
    };
    const __m512 larger = _mm512_set1_ps(1.0f + 0.72f / 256);
    if constexpr (FORMAT == E4M3) {
      factor_ = _mm512_mul_ps(load(int8_scales(group)), _mm512_mul_ps(larger, _mm512_set1_ps(1.0f / E4M3_SCALES)));
    } else if constexpr (FORMAT == INT8) {
      // With 15 bits of the factor, both are exact and 128 is 0.
      const __m512i fifteen = _mm512_set1_epi32(-512);
      const __m512 scale = (__m512)_mm512_and_si512((__m512i)_mm512_mul_ps(load(int8_scales(group)), larger), fifteen);
      factor_ = _mm512_mul_ps(scale, _mm512_set1_ps(STEPS));
      offset_ = _mm512_mul_ps(scale, _mm512_set1_ps(-STEPS - 128.0f));
    } else {
      factor_ = _mm512_mul_ps(load(int4_scales(group)), _mm512_mul_ps(larger, _mm512_set1_ps(STEPS)));
      offset_ = _mm512_fmsub_ps(load(int4_lows(group)), larger, factor_);
    }
  }

  ALWAYS_INLINE void quarter(int i) const {
    if (i == 0) fetch_ahead(lines_ - LINE);  // scales
    if constexpr (is_bytes(FORMAT)) {
      fetch_ahead(lines_ + 2 * i * LINE);
      fetch_ahead(lines_ + (2 * i + 1) * LINE);
      four_columns(line(2 * i), 2 * i);
      four_columns(line(2 * i + 1), 2 * i + 1);
    } else {
      fetch_ahead(lines_ + i * LINE);
      // With the highest bit of its byte the number stays above 1.
      const __m512i lower = _mm512_set1_epi8(0x0f), highest = _mm512_set1_epi8(-128), both = line(i);
      four_columns(_mm512_or_si512(_mm512_and_si512(both, lower), highest), 2 * i);
      four_columns(_mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(both, 4), lower), highest), 2 * i + 1);
    }
  }

 private:
  static constexpr int PLACE = FORMAT == INT8 ? 1 : 2;  // of the byte in the float: from bit 8 or 16 of its 23 on
  static constexpr float STEPS = FORMAT == INT8 ? 32768.0f : 128.0f;

  ALWAYS_INLINE __m512i line(int i) const { return _mm512_load_si512(lines_ + i * LINE); }
  // Of the four bytes in each word, the c-th.
  ALWAYS_INLINE __m512 weights(__m512i bytes, int c) const {
    const __m512i place = _mm512_set4_epi32(0x0c0c0c0c + 0x01010101 * c, 0x08080808 + 0x01010101 * c,
                                            0x04040404 + 0x01010101 * c, 0x01010101 * c);
    const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1.0f));
    const __m512i number = _mm512_mask_shuffle_epi8(one, 0x1111111111111111ull << PLACE, bytes, place);
    return _mm512_fmadd_ps((__m512)number, factor_, offset_);
  }
  // E4M3 is bf16 already, and only scaled.
  ALWAYS_INLINE __m512i scaled(__m512i pairs) const {
    const __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(-65536));
    return pairs_of(_mm512_mul_ps((__m512)_mm512_slli_epi32(pairs, 16), factor_), _mm512_mul_ps((__m512)second, factor_));
  }
  ALWAYS_INLINE void four_columns(__m512i bytes, int i) const {
    if constexpr (FORMAT == E4M3) {
      __m512i pairs[2];
      pairs_of_e4m3(bytes, pairs);
      _mm512_store_si512(out_ + 2 * i * LINE, scaled(pairs[0]));
      _mm512_store_si512(out_ + (2 * i + 1) * LINE, scaled(pairs[1]));
      return;
    }
    _mm512_store_si512(out_ + 2 * i * LINE, pairs_of(weights(bytes, 0), weights(bytes, 1)));
    _mm512_store_si512(out_ + (2 * i + 1) * LINE, pairs_of(weights(bytes, 2), weights(bytes, 3)));
  }

  const uint8_t* lines_;
  uint8_t* out_;
  __m512 factor_, offset_;
};

#endif
