// Sixteen 16-bit floats to and from fp32: bf16 and fp16, nearest even, NaN stays NaN. Included by vec.h.
#pragma once

static ALWAYS_INLINE float from_bf16(uint16_t x) {
  uint32_t u = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &u, 4);
  return out;
}
static ALWAYS_INLINE vec16 from_bf16(const uint16_t* x) {
  return bits16<float>(by_part<Sixteen<uint32_t>>([](auto u) { return u << 16; }, convert16<uint32_t>(load16(x))));
}

static ALWAYS_INLINE void to_bf16(const vec16& v, uint16_t* out) {
#if defined(__AVX512BF16__) && defined(HAS_AVX512)
  // Takes what is below the smallest normal number (1e-38) for zero.
  __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)v.parts[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
#else
  auto rounded = by_part<Sixteen<uint32_t>>([](auto u) { return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16; },
                                            bits16<uint32_t>(v));
  auto kept = where16(v == v, rounded, every16(0x7fc0u));
  store16(out, convert16<uint16_t>(kept));
#endif
}

// Any fp16: the exponent is moved by a multiplication, which also makes numbers of those that have no leading one.
static ALWAYS_INLINE vec16 from_fp16_bits(const Sixteen<uint32_t>& u) {
  auto shifted = by_part<Sixteen<uint32_t>>([](auto x) { return (x & 0x7fffu) << 13; }, u);
  auto sign = by_part<Sixteen<uint32_t>>([](auto x) { return (x & 0x8000u) << 16; }, u);
  vec16 value = bits16<float>(shifted) * 0x1p112f;
  ivec16 special = by_part<ivec16>([](auto x) { return (x & 0x7c00u) == 0x7c00u; }, u);  // infinity, NaN
  auto wide = by_part<Sixteen<uint32_t>>([](auto x) { return x | 0x7f800000u; }, shifted);
  auto magnitude = where16(special, wide, bits16<uint32_t>(value));
  return bits16<float>(by_part<Sixteen<uint32_t>>([](auto a, auto b) { return a | b; }, magnitude, sign));
}
static ALWAYS_INLINE vec16 from_fp16(const uint16_t* x) {
#if defined(HAS_AVX512)
  __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return vec16{{(vec16::Part)_mm512_cvtph_ps(halves)}};
#elif defined(__F16C__) && defined(__AVX2__)
  const __m128i* halves = reinterpret_cast<const __m128i*>(x);
  return vec16{{(vec16::Part)_mm256_cvtph_ps(_mm_loadu_si128(halves)),
                (vec16::Part)_mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
#elif defined(__aarch64__)
  return by_part<vec16>([](auto u) { return (vec16::Part)vcvt_f32_f16((float16x4_t)u); }, load16(x));
#else
  return from_fp16_bits(convert16<uint32_t>(load16(x)));
#endif
}

// One number: packing is where it is used, and every CPU must round alike there.
static inline uint16_t to_fp16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {                                              // below 2^-14: steps of 2^-24
    float step, size;
    std::memcpy(&size, &magnitude, 4);
    step = size + 0.5f;  // a float of this size has steps of 2^-24
    uint32_t bits;
    std::memcpy(&bits, &step, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
static inline float from_fp16(uint16_t x) {
  return from_fp16_bits(every16<uint32_t>(x))[0];
}
static ALWAYS_INLINE void to_fp16(const vec16& v, uint16_t* out) {
#if defined(HAS_AVX512)
  __m256i halves = _mm512_cvtps_ph((__m512)v.parts[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
#elif defined(__F16C__) && defined(__AVX2__)
  __m128i* halves = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(halves, _mm256_cvtps_ph((__m256)v.parts[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph((__m256)v.parts[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; ++i) out[i] = to_fp16(v[i]);
#endif
}
