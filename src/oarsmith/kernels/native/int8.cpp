// Rows of numbers to 8 bits with a scale a row, and sums of 8-bit products back, each with a rotation of the row.
#include <vector>

#include "int8_rows.h"

// q[r] * scale[r] is x[r], times `columns` where given, and rotated.
template <class T>
static void quantize_rows(const T* x, const float* columns, int8_t* q, float* scale, int64_t rows, int64_t dim,
                          int64_t block) {
#pragma omp parallel if (rows * dim > SERIAL)
  {
    std::vector<float> buffer(dim);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      scale[r] = quantize_row(x + r * dim, columns, q + r * dim, buffer.data(), dim, block);
  }
}

// out[r] = sums[r] * scale[r], times `columns` and plus `bias` where given; or rotated (block > 1), without these two.
template <class T>
static void dequantize_rows(const int32_t* sums, const float* scale, const float* columns, const float* bias, T* out,
                            int64_t rows, int64_t dim, int64_t block) {
  const float norm = rotation_norm(block);
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
