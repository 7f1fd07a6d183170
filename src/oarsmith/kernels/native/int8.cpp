// Rows of numbers to 8 bits with a scale a row, and sums of 8-bit products back, each with a rotation of the row.
// The rotation is a Hadamard transform of `block` entries that lie dim / block apart: stage by stage, pairs at a distance
// become their sum and difference, and the distance halves. Left out: the factor 1 / sqrt(block), which goes into scales.
#include <vector>

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

// q[r] * scale[r] is x[r], times `columns` where given, and rotated.
template <class T>
static void quantize_rows(const T* x, const float* columns, int8_t* q, float* scale, int64_t rows, int64_t dim,
                          int64_t block) {
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
#pragma omp parallel if (rows * dim > SERIAL)
  {
    std::vector<float> buffer(dim);
    float* w = buffer.data();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const T* xr = x + r * dim;
      int8_t* qr = q + r * dim;
      if (columns) {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) w[i] = load(xr + i) * columns[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) w[i] = load(xr + i);
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
      bool finite = highest < 0x7f800000u;
      float inverse = finite && top > 0.0f ? 127.0f / top : 0.0f;
      scale[r] = finite ? top * norm / 127.0f : NAN;
      if (!finite) {
        std::memset(qr, 0, dim);
        continue;
      }
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) qr[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(w[i] * inverse)));
    }
  }
}

// out[r] = sums[r] * scale[r], times `columns` and plus `bias` where given; or rotated (block > 1), without these two.
template <class T>
static void dequantize_rows(const int32_t* sums, const float* scale, const float* columns, const float* bias, T* out,
                            int64_t rows, int64_t dim, int64_t block) {
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
#pragma omp parallel if (rows * dim > SERIAL)
  {
    std::vector<float> buffer(block > 1 ? dim : 0);
    float* w = buffer.data();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* s = sums + r * dim;
      T* o = out + r * dim;
      const float c = scale[r] * norm;
      if (block > 1) {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) w[i] = static_cast<float>(s[i]) * c;
        butterflies(w, dim, block);
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) store(o + i, w[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) {
          float y = static_cast<float>(s[i]) * c;
          y = columns ? y * columns[i] : y;
          store(o + i, bias ? y + bias[i] : y);
        }
      }
    }
  }
}

#define EXPORT(T, suffix)                                                                                                \
  extern "C" void quantize_rows_##suffix(const T* x, const float* columns, int8_t* q, float* scale, int64_t rows,        \
                                         int64_t dim, int64_t block) {                                                   \
    quantize_rows<T>(x, columns, q, scale, rows, dim, block);                                                            \
  }                                                                                                                      \
  extern "C" void dequantize_rows_##suffix(const int32_t* sums, const float* scale, const float* columns,                \
                                           const float* bias, T* out, int64_t rows, int64_t dim, int64_t block) {        \
    dequantize_rows<T>(sums, scale, columns, bias, out, rows, dim, block);                                               \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
