// What the compiler may use, and the products of short rows that it does not find by itself.
#pragma once
#include <algorithm>

#include "matrix.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(HAS_AVX512) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(HAS_AVX512) && defined(__AVX512BF16__)
static constexpr bool DOTS_OF_HALVES = true;
#else
static constexpr bool DOTS_OF_HALVES = false;
#endif

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
static constexpr bool DOTS_OF_BYTES = true;
#else
static constexpr bool DOTS_OF_BYTES = false;
#endif

// From how many rows on the products of tiles are faster, by format (F32 and F16 have none), and how many they
// take at a time.
static constexpr int64_t FEWEST_ROWS_FOR_TILES[6] = {INT64_MAX, 2, 13, 13, INT64_MAX, 4}, ROWS_OF_TILES = 32;

// How many rows at most have their sums in registers.
static constexpr int MOST_ROWS_IN_REGISTERS = 12;
constexpr int most_rows_in_registers(Format format) {
#ifdef HAS_AVX512
  (void)format;
  return MOST_ROWS_IN_REGISTERS;
#else
  return (format == INT8 || format == INT4) && DOTS_OF_BYTES ? 3 : 6;
#endif
}

// How many of some rows are computed at a time: equal parts, for a last part of one row would wait for its own sums.
constexpr int rows_in_registers(Format format, int64_t rows) {
  const int64_t most = most_rows_in_registers(format), parts = std::max<int64_t>(1, (rows + most - 1) / most);
  const int64_t each = (rows + parts - 1) / parts;
  for (int size : {1, 2, 3, 4, 6, 8, 10, 11})
    if (each <= size) return size;
  return MOST_ROWS_IN_REGISTERS;
}

// Linux lets a process use tiles after it asked, for good.
static inline bool tiles_allowed() {
#ifdef HAS_TILES
  static const bool allowed = [] {
    const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

// sum + the products of pairs of bf16: those of a line with one pair.
static ALWAYS_INLINE vec16 dot_halves(const vec16& sum, const ivec16& line, int32_t pair) {
#if defined(HAS_AVX512) && defined(__AVX512BF16__)
  __m512bh weights = (__m512bh)line.parts[0], inputs = (__m512bh)_mm512_set1_epi32(pair);
  return {{(vec16::Part)_mm512_dpbf16_ps((__m512)sum.parts[0], weights, inputs)}};
#else
  (void)line, (void)pair;
  return sum;
#endif
}

// The bits of a float that is so large that its fraction counts whole numbers: with them a sum of whole numbers, added
// to as an integer, is a float all the time.
static constexpr float WHOLE = ROUNDING;
static constexpr int32_t WHOLE_BITS = 0x4b400000;

// WHOLE + a number to begin with + sums over a group of the products of unsigned bytes with signed ones: of the four in
// each word of a line with four inputs. FORMAT says how large the unsigned ones are.
#if defined(__AVX512VNNI__) && defined(HAS_AVX512)
template <Format FORMAT>
struct DotsOfBytes {
  ivec16 sum;
  ALWAYS_INLINE void begin(int32_t bits) { sum = every16(bits); }
  ALWAYS_INLINE void add(const ivec16& line, int32_t four) {
    sum.parts[0] = (ivec16::Part)_mm512_dpbusd_epi32((__m512i)sum.parts[0], (__m512i)line.parts[0],
                                                    _mm512_set1_epi32(four));
  }
  ALWAYS_INLINE vec16 total() const { return bits16<float>(sum); }
};
#elif defined(__AVXVNNI__)
template <Format FORMAT>
struct DotsOfBytes {
  ivec16 sum;
  ALWAYS_INLINE void begin(int32_t bits) { sum = every16(bits); }
  ALWAYS_INLINE void add(const ivec16& line, int32_t four) {
    const __m256i inputs = _mm256_set1_epi32(four);
    sum = by_part<ivec16>(
        [inputs](auto s, auto w) { return (ivec16::Part)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)w, inputs); }, sum,
        line);
  }
  ALWAYS_INLINE vec16 total() const { return bits16<float>(sum); }
};
#elif defined(__AVX2__)
// There are products of bytes whose sums of two have 16 bits. For 4-bit weights so have the sums over a group (of 16
// products of at most 15 * 127). 8-bit ones are made signed, for 255 * 127 twice has more than 16 bits; they need no
// correction.
template <Format FORMAT>
struct DotsOfBytes {
  ivec16 sum;
  ALWAYS_INLINE void begin(int32_t) { sum = FORMAT == INT4 ? ivec16{} : every16(WHOLE_BITS); }
  ALWAYS_INLINE void add(const ivec16& line, int32_t four) {
    const __m256i inputs = _mm256_set1_epi32(four);
    sum = by_part<ivec16>([inputs](auto s, auto w) { return (ivec16::Part)add_part((__m256i)s, (__m256i)w, inputs); },
                          sum, line);
  }
  ALWAYS_INLINE vec16 total() const {
    if constexpr (FORMAT == INT8) return bits16<float>(sum);
    return bits16<float>(every16(WHOLE_BITS) +
                         by_part<ivec16>([](auto s) { return (ivec16::Part)pairs_added((__m256i)s); }, sum));
  }

 private:
  static ALWAYS_INLINE __m256i pairs_added(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
  static ALWAYS_INLINE __m256i add_part(__m256i s, __m256i weights, __m256i inputs) {
    if constexpr (FORMAT == INT4) return _mm256_add_epi16(s, _mm256_maddubs_epi16(weights, inputs));
    const __m256i with_sign = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));  // and it goes over to the input
    const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(with_sign), _mm256_sign_epi8(inputs, with_sign));
    return _mm256_add_epi32(s, pairs_added(products));
  }
};
#elif defined(__ARM_FEATURE_DOTPROD)
// Of signed bytes: 8-bit weights are made so, and need no correction.
template <Format FORMAT>
struct DotsOfBytes {
  ivec16 sum;
  ALWAYS_INLINE void begin(int32_t) { sum = every16(WHOLE_BITS); }
  ALWAYS_INLINE void add(const ivec16& line, int32_t four) {
    const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four)), middle = vdupq_n_s8(FORMAT == INT8 ? -128 : 0);
    sum = by_part<ivec16>(
        [&](auto s, auto w) { return (ivec16::Part)vdotq_s32((int32x4_t)s, veorq_s8((int8x16_t)w, middle), inputs); },
        sum, line);
  }
  ALWAYS_INLINE vec16 total() const { return bits16<float>(sum); }
};
#else
template <Format FORMAT>
struct DotsOfBytes {  // never used: DOTS_OF_BYTES is false
  void begin(int32_t) {}
  void add(const ivec16&, int32_t) {}
  vec16 total() const { return zero16(); }
};
#endif
