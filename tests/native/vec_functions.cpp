// The functions of vec.h on arrays of a multiple of 16 numbers.
#include "vec.h"

template <class F>
static void each16(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += 16) f(i);
}

extern "C" {
void vec_exp(const float* x, float* y, int64_t n) {
  each16(n, [&](int64_t i) { store16(y + i, exp16(load16(x + i))); });
}
void vec_tanh(const float* x, float* y, int64_t n) {
  each16(n, [&](int64_t i) { store16(y + i, tanh16(load16(x + i))); });
}
void vec_to_bf16(const float* x, uint16_t* y, int64_t n) {
  each16(n, [&](int64_t i) { to_bf16(load16(x + i), y + i); });
}
void vec_from_bf16(const uint16_t* x, float* y, int64_t n) {
  each16(n, [&](int64_t i) { store16(y + i, from_bf16(x + i)); });
}
void vec_to_fp16(const float* x, uint16_t* y, int64_t n) {
  each16(n, [&](int64_t i) { to_fp16(load16(x + i), y + i); });
}
void vec_to_fp16_one(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_fp16(x[i]);
}
void vec_from_fp16(const uint16_t* x, float* y, int64_t n) {
  each16(n, [&](int64_t i) { store16(y + i, from_fp16(x + i)); });
}
void vec_from_fp16_one(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = from_fp16(x[i]);
}
// For each sixteen: sum, largest, largest size of these and the next sixteen.
void vec_across(const float* x, float* y, int64_t n) {
  each16(n - 16, [&](int64_t i) {
    const vec16 v = load16(x + i);
    y[3 * (i / 16)] = sum16(v);
    y[3 * (i / 16) + 1] = max_of16(v);
    y[3 * (i / 16) + 2] = largest16(v, load16(x + i + 16));
  });
}
void vec_round(const float* x, int32_t* y, int64_t n) {
  each16(n, [&](int64_t i) { store16(y + i, round16(load16(x + i))); });
}
void vec_bytes(const float* x, int8_t* y, int64_t n) {
  each16(n, [&](int64_t i) { store_bytes16(y + i, round16(load16(x + i))); });
}
void vec_max(const float* a, const float* b, float* y, int64_t n) {
  each16(n, [&](int64_t i) { store16(y + i, max16(load16(a + i), load16(b + i))); });
}
void vec_min(const float* a, const float* b, float* y, int64_t n) {
  each16(n, [&](int64_t i) { store16(y + i, min16(load16(a + i), load16(b + i))); });
}
}
