// Shared by the CPU kernels: bf16 <-> fp32, a vectorisable exp, and the row loop.
// Plain C++ without intrinsics: the compiler vectorises these loops for the machine it runs on (-march=native).
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>
#include <algorithm>
#include <omp.h>

// Elements below which one thread does the work: waking a second one costs more than it saves (a token being decoded).
static const int64_t SERIAL = 1 << 14;

struct bf16 { uint16_t bits; };

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) {
  uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline void store(float* p, float v) { *p = v; }
static inline void store(bf16* p, float v) {
  // Round to nearest even, as PyTorch does; a NaN must not round up to infinity.
  uint32_t u;
  std::memcpy(&u, &v, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// exp for x <= 88; relative error below 2e-7 on [-87, 88], 0 below. Cody-Waite reduction and a degree-6 polynomial (Cephes).
// A NaN stays a NaN: the comparisons below are written so that it falls through.
static inline float fast_exp(float x) {
  float clipped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float n = std::floor(clipped * 1.44269504088896341f + 0.5f);
  float r = clipped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float two_n;
  std::memcpy(&two_n, &exponent, 4);
  float y = p * two_n;
  return x < -87.0f ? 0.0f : y;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
static inline float fast_tanh(float x) {
  float clipped = x < -15.0f ? -15.0f : (x > 15.0f ? 15.0f : x);
  float e = fast_exp(2.0f * clipped);
  return (e - 1.0f) / (e + 1.0f);
}
