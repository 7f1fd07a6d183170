// Weights on integer grids: what shrunken ranges lose, and columns rounded one after another (GPTQ).
#include "common.h"
#include <vector>

// The loss of each factor: sum of importance * (weight - rounded)^2 over a group on the scale times the factor.
// weight [rows, width], scale and zero [rows, groups] (no zeros: `middle`), importance [width], losses [points, rows, groups].
extern "C" void shrink_losses_f32(const float* weight, const float* scale, const float* zero, const float* importance,
                                  const float* factors, float* losses, int64_t rows, int64_t width, int64_t group,
                                  int64_t points, float middle, float largest) {
  const int64_t groups = (width + group - 1) / group;
#pragma omp parallel if (rows * width > SERIAL)
  {
    std::vector<float> buffer(group);
    float* units = buffer.data();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group, size = std::min(group, width - first);
        const float step = scale[r * groups + g], z = zero ? zero[r * groups + g] : middle;
        const float *own = weight + r * width + first, *counts = importance + first;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) units[i] = own[i] / step;
        for (int64_t p = 0; p < points; ++p) {
          const float inverse = 1.0f / factors[p];
          float lost = 0.0f;
#pragma omp simd reduction(+ : lost)
          for (int64_t i = 0; i < size; ++i) {
            const float exact = units[i] * inverse + z;
            float near = std::nearbyint(exact);
            near = near < 0.0f ? 0.0f : near;
            near = near > largest ? largest : near;
            lost += counts[i] * (exact - near) * (exact - near);
          }
          const float unit = factors[p] * step;
          losses[(p * rows + r) * groups + g] = lost * unit * unit;
        }
      }
  }
}

// For the numbers n - zero that weights have on their scales: sums of importance * weight * number and of
// importance * number^2 over each group, [rows, groups]. Their ratio is the scale of least loss for these numbers.
extern "C" void fit_sums_f32(const float* weight, const float* scale, const float* zero, const float* importance,
                             float* products, float* squares, int64_t rows, int64_t width, int64_t group, float middle,
                             float largest) {
  const int64_t groups = (width + group - 1) / group;
#pragma omp parallel for schedule(static) if (rows * width > SERIAL)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group, size = std::min(group, width - first);
      const float step = scale[r * groups + g], z = zero ? zero[r * groups + g] : middle;
      const float *own = weight + r * width + first, *counts = importance + first;
      float product = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : product, square)
      for (int64_t i = 0; i < size; ++i) {
        float near = std::nearbyint(own[i] / step + z);
        near = near < 0.0f ? 0.0f : near;
        near = (near > largest ? largest : near) - z;
        product += counts[i] * own[i] * near;
        square += counts[i] * near * near;
      }
      products[r * groups + g] = product;
      squares[r * groups + g] = square;
    }
}

// Columns of a batch, transposed: weight, numbers and lost [columns, out], their scales, inverse scales and zeros
// [groups, out] by `group_of` [columns]. `root` [columns, columns] is upper triangular: column j first takes
// -root[k, j] * lost[k] of each earlier one, and handed[k, j] * weight[k] where there is `handed`. Then it is rounded, and
// what it lost is divided by root[j, j]. Outputs do not meet, so each thread takes some of them through all columns.
extern "C" void round_columns_f32(float* weight, float* numbers, float* lost, const float* scale, const float* inverse,
                                  const float* zero, const int64_t* group_of, const float* root, const float* handed,
                                  int64_t columns, int64_t out, float middle, float largest) {
  constexpr int64_t TILE = 64;
#pragma omp parallel for schedule(static) if (columns * out > SERIAL)
  for (int64_t start = 0; start < out; start += TILE) {
    const int64_t size = std::min(TILE, out - start);
    float own[TILE];
    for (int64_t j = 0; j < columns; ++j) {
      float* w = weight + j * out + start;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) own[i] = w[i];
      for (int64_t k = 0; k < j; ++k) {
        const float taken = root[k * columns + j];
        const float* l = lost + k * out + start;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) own[i] -= taken * l[i];
        if (handed) {
          const float given = handed[k * columns + j];
          const float* before = weight + k * out + start;
#pragma omp simd
          for (int64_t i = 0; i < size; ++i) own[i] += given * before[i];
        }
      }
      const int64_t place = group_of[j] * out + start;
      const float divisor = 1.0f / root[j * columns + j];
      float *n = numbers + j * out + start, *l = lost + j * out + start;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float z = zero ? zero[place + i] : middle;
        float near = std::nearbyint(own[i] * inverse[place + i] + z);
        near = near < 0.0f ? 0.0f : near;
        near = near > largest ? largest : near;
        n[i] = near;
        w[i] = own[i];
        l[i] = (own[i] - (near - z) * scale[place + i]) * divisor;
      }
    }
  }
}
