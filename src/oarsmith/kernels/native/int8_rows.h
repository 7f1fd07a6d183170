// A row of numbers in 8 bits with a scale, after a rotation of the row.
// The rotation is a Hadamard transform of `block` entries that lie dim / block apart: stage by stage, pairs at a distance
// become their sum and difference, and the distance halves. Left out: the factor 1 / sqrt(block), which goes into scales.
#pragma once
#include "common.h"

static inline void butterflies(float* x, int64_t dim, int64_t block) {
  for (int64_t span = dim / 2; block > 1; span /= 2, block /= 2) {
    for (float* a = x; a < x + dim; a += 2 * span) {
      float* b = a + span;
#pragma omp simd
      for (int64_t i = 0; i < span; ++i) {
        float u = a[i], v = b[i];
        a[i] = u + v;
        b[i] = u - v;
      }
    }
  }
}

static inline float rotation_norm(int64_t block) { return 1.0f / std::sqrt(static_cast<float>(block)); }

// q times the scale that is returned is x, times `columns` where given, and rotated; w has room for the row.
template <class T>
static inline float quantize_row(const T* x, const float* columns, int8_t* q, float* w, int64_t dim, int64_t block) {
  if (columns) {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) w[i] = load(x + i) * columns[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) w[i] = load(x + i);
  }
  butterflies(w, dim, block);
  // Magnitudes of floats are in the order of their bits, where what is not finite comes last.
  uint32_t highest = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < dim; ++i) {
    uint32_t bits;
    std::memcpy(&bits, w + i, 4);
    bits &= 0x7fffffffu;
    highest = bits > highest ? bits : highest;
  }
  float top;
  std::memcpy(&top, &highest, 4);
  // 8 bits cannot hold what is not finite: it makes the scale, and with it the row, NaN.
  if (highest >= 0x7f800000u) {
    std::memset(q, 0, dim);
    return NAN;
  }
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) q[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(w[i] * inverse)));
  return top * rotation_norm(block) / 127.0f;
}
