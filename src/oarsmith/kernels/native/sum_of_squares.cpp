// The squared L2 norm of a bf16 tensor in one pass, the same number for any number of threads.
#include "common.h"
#include <vector>

extern "C" void sum_of_squares_bf16(const bf16* x, int64_t n, double* out) {
  const int64_t CHUNK = 1 << 14;
  std::vector<double> parts((n + CHUNK - 1) / CHUNK);
#pragma omp parallel for schedule(static) if (n > SERIAL)
  for (int64_t start = 0; start < n; start += CHUNK) {
    int64_t stop = std::min(start + CHUNK, n);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; ++i) {
      float value = load(x + i);
      sum += value * value;
    }
    parts[start / CHUNK] = sum;
  }
  double total = 0.0;
  for (double part : parts) total += part;
  *out = total;
}
