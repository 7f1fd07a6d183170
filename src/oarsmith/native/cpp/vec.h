// Sixteen numbers at a time, on whatever registers there are: one of 64 bytes, two of 32 or four of 16.
// (GCC keeps a 64-byte vector in memory on a CPU without such registers, so this is a struct of parts that fit.)
// Intrinsics only where GCC's vectors have no word for it: halves of floats, fused products, sums across.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAS_AVX512 1
static constexpr int PARTS = 1;
#elif defined(__AVX2__)
static constexpr int PARTS = 2;
#else
static constexpr int PARTS = 4;
#endif
static constexpr int LANES = 16 / PARTS;

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <class T>
struct Sixteen {
  typedef T Part __attribute__((vector_size(LANES * sizeof(T))));
  Part parts[PARTS];
  ALWAYS_INLINE T operator[](int i) const { return parts[i / LANES][i % LANES]; }
};
using vec16 = Sixteen<float>;
using ivec16 = Sixteen<int32_t>;  // also what a comparison gives: -1 for true, 0 for false

// f of every part of the arguments.
template <class R, class F, class... V>
static ALWAYS_INLINE R by_part(F f, const V&... v) {
  R out;
  if constexpr (PARTS == 1)
    out.parts[0] = f(v.parts[0]...);
  else if constexpr (PARTS == 2)
    out.parts[0] = f(v.parts[0]...), out.parts[1] = f(v.parts[1]...);
  else
    out.parts[0] = f(v.parts[0]...), out.parts[1] = f(v.parts[1]...), out.parts[2] = f(v.parts[2]...),
    out.parts[3] = f(v.parts[3]...);
  return out;
}

template <class T>
static ALWAYS_INLINE Sixteen<T> load16(const T* x) {
  Sixteen<T> out;
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; ++i) std::memcpy(&out.parts[i], x + i * LANES, sizeof(out.parts[i]));
  return out;
}
template <class T>
static ALWAYS_INLINE void store16(T* x, const Sixteen<T>& v) {
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; ++i) std::memcpy(x + i * LANES, &v.parts[i], sizeof(v.parts[i]));
}
template <class T>
static ALWAYS_INLINE Sixteen<T> every16(T x) {
  using Part = typename Sixteen<T>::Part;
  return by_part<Sixteen<T>>([x](Part zero) { return x - zero; }, Sixteen<T>{});
}
static ALWAYS_INLINE vec16 all16(float x) { return every16(x); }
static ALWAYS_INLINE vec16 zero16() { return vec16{}; }

template <class T>
static ALWAYS_INLINE Sixteen<T> operator+(const Sixteen<T>& a, const Sixteen<T>& b) {
  return by_part<Sixteen<T>>([](auto x, auto y) { return x + y; }, a, b);
}
template <class T>
static ALWAYS_INLINE Sixteen<T> operator-(const Sixteen<T>& a, const Sixteen<T>& b) {
  return by_part<Sixteen<T>>([](auto x, auto y) { return x - y; }, a, b);
}
template <class T>
static ALWAYS_INLINE Sixteen<T> operator*(const Sixteen<T>& a, const Sixteen<T>& b) {
  return by_part<Sixteen<T>>([](auto x, auto y) { return x * y; }, a, b);
}
template <class T>
static ALWAYS_INLINE Sixteen<T> operator/(const Sixteen<T>& a, const Sixteen<T>& b) {
  return by_part<Sixteen<T>>([](auto x, auto y) { return x / y; }, a, b);
}
template <class T>
static ALWAYS_INLINE Sixteen<T> operator&(const Sixteen<T>& a, const Sixteen<T>& b) {
  return by_part<Sixteen<T>>([](auto x, auto y) { return x & y; }, a, b);
}
template <class T>
static ALWAYS_INLINE Sixteen<T> operator-(const Sixteen<T>& a) {
  return by_part<Sixteen<T>>([](auto x) { return -x; }, a);
}
template <class T>
static ALWAYS_INLINE Sixteen<T> operator+(const Sixteen<T>& a, T b) { return a + every16(b); }
template <class T>
static ALWAYS_INLINE Sixteen<T> operator-(const Sixteen<T>& a, T b) { return a - every16(b); }
template <class T>
static ALWAYS_INLINE Sixteen<T> operator*(const Sixteen<T>& a, T b) { return a * every16(b); }
template <class T>
static ALWAYS_INLINE Sixteen<T> operator/(const Sixteen<T>& a, T b) { return a / every16(b); }
template <class T, class B>
static ALWAYS_INLINE Sixteen<T>& operator+=(Sixteen<T>& a, const B& b) { return a = a + b; }
template <class T, class B>
static ALWAYS_INLINE Sixteen<T>& operator-=(Sixteen<T>& a, const B& b) { return a = a - b; }
template <class T, class B>
static ALWAYS_INLINE Sixteen<T>& operator*=(Sixteen<T>& a, const B& b) { return a = a * b; }

template <class T>
static ALWAYS_INLINE ivec16 operator<(const Sixteen<T>& a, const Sixteen<T>& b) {
  return by_part<ivec16>([](auto x, auto y) { return x < y; }, a, b);
}
template <class T>
static ALWAYS_INLINE ivec16 operator>(const Sixteen<T>& a, const Sixteen<T>& b) { return b < a; }
template <class T>
static ALWAYS_INLINE ivec16 operator==(const Sixteen<T>& a, const Sixteen<T>& b) {
  return by_part<ivec16>([](auto x, auto y) { return x == y; }, a, b);
}
// yes where the condition holds, no elsewhere.
template <class T>
static ALWAYS_INLINE Sixteen<T> where16(const ivec16& condition, const Sixteen<T>& yes, const Sixteen<T>& no) {
  return by_part<Sixteen<T>>([](auto c, auto x, auto y) { return c ? x : y; }, condition, yes, no);
}
// The same bits as another type of the same size.
template <class To, class From>
static ALWAYS_INLINE Sixteen<To> bits16(const Sixteen<From>& v) {
  return by_part<Sixteen<To>>([](auto x) { return (typename Sixteen<To>::Part)x; }, v);
}
// The same numbers, whole ones cut towards zero.
template <class To, class From>
static ALWAYS_INLINE Sixteen<To> convert16(const Sixteen<From>& v) {
  return by_part<Sixteen<To>>([](auto x) { return __builtin_convertvector(x, typename Sixteen<To>::Part); }, v);
}

// The lowest byte of each whole number. (Without AVX512, GCC would do it one by one.)
static ALWAYS_INLINE void store_bytes16(void* to, const ivec16& v) {
  uint8_t* out = static_cast<uint8_t*>(to);
  if constexpr (PARTS == 1) return store16(out, convert16<uint8_t>(v));
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; ++i) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
    const Bytes all = (Bytes)v.parts[i];
    const auto lowest = [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      return __builtin_shufflevector(all, all, 4 * I...);
    }(std::make_integer_sequence<int, LANES>());
    std::memcpy(out + i * LANES, &lowest, LANES);
  }
}

// a * b + c, rounded once where the CPU can.
static ALWAYS_INLINE vec16 fma16(const vec16& a, const vec16& b, const vec16& c) {
  return by_part<vec16>(
      [](auto x, auto y, auto z) {
#if defined(HAS_AVX512)
        return (vec16::Part)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__) && defined(__AVX2__)
        return (vec16::Part)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__aarch64__)
        return (vec16::Part)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
        return x * y + z;
#endif
      },
      a, b, c);
}
static ALWAYS_INLINE vec16 fma16(const vec16& a, float b, const vec16& c) { return fma16(a, all16(b), c); }

// The larger or smaller of two; a NaN in `a` stays.
static ALWAYS_INLINE vec16 max16(const vec16& a, const vec16& b) { return where16(a < b, b, a); }
static ALWAYS_INLINE vec16 min16(const vec16& a, const vec16& b) { return where16(b < a, b, a); }
template <class T>
static ALWAYS_INLINE Sixteen<T> abs16(const Sixteen<T>& a) {
  return bits16<T>(bits16<int32_t>(a) & every16(0x7fffffff));
}

// The lanes moved round by some, and all of them by f of two vectors.
template <int BY, class Part>
static ALWAYS_INLINE Part rotated(Part x) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(x, x, (I + BY) % LANES...);
  }(std::make_integer_sequence<int, LANES>());
}
template <int WIDTH, class Part, class F>
static ALWAYS_INLINE Part folded(Part x, F f) {
  if constexpr (WIDTH == 0)
    return x;
  else
    return folded<WIDTH / 2>(f(x, rotated<WIDTH>(x)), f);
}
template <class T, class F>
static ALWAYS_INLINE T fold16(const Sixteen<T>& v, F f) {
  auto x = v.parts[0];
  for (int i = 1; i < PARTS; ++i) x = f(x, v.parts[i]);
  return folded<LANES / 2>(x, f)[0];
}
template <class T>
static ALWAYS_INLINE T sum16(const Sixteen<T>& v) {
  return fold16(v, [](auto a, auto b) { return a + b; });
}
// The largest; NaNs are not looked for.
template <class T>
static ALWAYS_INLINE T max_of16(const Sixteen<T>& v) {
  return fold16(v, [](auto a, auto b) { return a < b ? b : a; });
}

// The largest size of two times sixteen numbers; infinity or NaN if there is one.
static ALWAYS_INLINE float largest16(const vec16& a, const vec16& b) {
  // Sizes of floats are in the order of their bits, where what is not finite comes last.
  const ivec16 x = bits16<int32_t>(abs16(a)), y = bits16<int32_t>(abs16(b));
  const int32_t bits = max_of16(where16(x < y, y, x));
  float largest;
  std::memcpy(&largest, &bits, 4);
  return largest;
}

// The nearest whole numbers, ties to even, for |x| < 2^22.
static constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: a float of this size has no fraction
static ALWAYS_INLINE ivec16 round16(const vec16& x) {
#ifdef HAS_AVX512
  return ivec16{{(ivec16::Part)_mm512_cvtps_epi32((__m512)x.parts[0])}};
#else
  return bits16<int32_t>(x + ROUNDING) - bits16<int32_t>(all16(ROUNDING));
#endif
}

#include "halves.h"
#include "functions.h"
