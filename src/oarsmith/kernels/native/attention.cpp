// The softmax of block attention, forward and backward, in place on score blocks.
// A block holds the queries [first, first + rows) of a span against its keys [0, keys): query i sees key j iff
// i - window < j <= i (window <= 0: no lower limit). Heads that share a kv head lie one after another ("folded").
#include "common.h"

static inline void visible(int64_t query, int64_t keys, int64_t window, int64_t key0, int64_t* from, int64_t* to) {
  int64_t low = window > 0 ? query - window + 1 : 0, high = query + 1;
  *from = std::min(std::max<int64_t>(low - key0, 0), keys);
  *to = std::min(std::max<int64_t>(high - key0, 0), keys);
}

// s[batch, group * rows, keys] raw scores -> probabilities; lse[batch, group * rows] = log sum exp(scale * s).
template <class T>
static void softmax_forward(T* s, float* lse, int64_t batch, int64_t group, int64_t rows, int64_t keys, int64_t first,
                            int64_t key0, int64_t window, float scale) {
#pragma omp parallel for schedule(static) if (batch * group * rows * keys > SERIAL)
  for (int64_t r = 0; r < batch * group * rows; ++r) {
    T* p = s + r * keys;
    int64_t from, to;
    visible(first + r % rows, keys, window, key0, &from, &to);
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = from; j < to; ++j) top = std::max(top, load(p + j));
    top *= scale;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = from; j < to; ++j) sum += fast_exp(load(p + j) * scale - top);
    float l = top + std::log(sum);
    lse[r] = l;
    for (int64_t j = 0; j < from; ++j) store(p + j, 0.0f);
#pragma omp simd
    for (int64_t j = from; j < to; ++j) store(p + j, fast_exp(load(p + j) * scale - l));
    for (int64_t j = to; j < keys; ++j) store(p + j, 0.0f);
  }
}

// The same probabilities again from lse.
template <class T>
static void softmax_again(T* s, const float* lse, int64_t batch, int64_t group, int64_t rows, int64_t keys, int64_t first,
                          int64_t key0, int64_t window, float scale) {
#pragma omp parallel for schedule(static) if (batch * group * rows * keys > SERIAL)
  for (int64_t r = 0; r < batch * group * rows; ++r) {
    T* p = s + r * keys;
    int64_t from, to;
    visible(first + r % rows, keys, window, key0, &from, &to);
    float l = lse[r];
    for (int64_t j = 0; j < from; ++j) store(p + j, 0.0f);
#pragma omp simd
    for (int64_t j = from; j < to; ++j) store(p + j, fast_exp(load(p + j) * scale - l));
    for (int64_t j = to; j < keys; ++j) store(p + j, 0.0f);
  }
}

// dp -> ds = scale * p * (dp - sum(p * dp)), in place; p is zero where hidden, so hidden keys get zero.
template <class T> static void softmax_backward(const T* p, T* dp, int64_t total_rows, int64_t keys, float scale) {
#pragma omp parallel for schedule(static) if (total_rows * keys > SERIAL)
  for (int64_t r = 0; r < total_rows; ++r) {
    const T* pr = p + r * keys;
    T* dr = dp + r * keys;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < keys; ++j) dot += load(pr + j) * load(dr + j);
#pragma omp simd
    for (int64_t j = 0; j < keys; ++j) store(dr + j, scale * load(pr + j) * (load(dr + j) - dot));
  }
}

#define EXPORT(T, suffix)                                                                                                \
  extern "C" void softmax_forward_##suffix(T* s, float* lse, int64_t batch, int64_t group, int64_t rows, int64_t keys,   \
                                           int64_t first, int64_t key0, int64_t window, float scale) {                   \
    softmax_forward<T>(s, lse, batch, group, rows, keys, first, key0, window, scale);                                    \
  }                                                                                                                      \
  extern "C" void softmax_again_##suffix(T* s, const float* lse, int64_t batch, int64_t group, int64_t rows,             \
                                         int64_t keys, int64_t first, int64_t key0, int64_t window, float scale) {       \
    softmax_again<T>(s, lse, batch, group, rows, keys, first, key0, window, scale);                                      \
  }                                                                                                                      \
  extern "C" void softmax_backward_##suffix(const T* p, T* dp, int64_t total_rows, int64_t keys, float scale) {          \
    softmax_backward<T>(p, dp, total_rows, keys, scale);                                                                 \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
