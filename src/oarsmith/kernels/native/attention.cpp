// The softmax of block attention, forward and backward, in place on score blocks.
// A block holds the queries [first, first + rows) of a span against its keys [0, keys): query i sees key j iff
// i - window < j <= i (window <= 0: no lower limit) or j < prefix. Heads that share a kv head lie one after another
// ("folded"). Scores may get a bias that depends on head and positions (ALiBi), a soft cap, and a sink per head.
#include "common.h"


// What a score goes through beside the scale. Null and zero: nothing.
struct Extra {
  const float* bias;  // [heads, positions]: bias[h, key] - bias[h, query] is added
  int64_t positions;
  float cap;           // score -> cap * tanh(score / cap)
  const float* sinks;  // [heads]: a score that takes part in the softmax and has no value
  int64_t prefix;      // keys that every query sees
};

static inline void visible(int64_t query, int64_t keys, int64_t window, int64_t key0, int64_t prefix, int64_t* from,
                           int64_t* to) {
  int64_t low = window > 0 ? query - window + 1 : 0, high = std::max(query + 1, prefix);
  *from = std::min(std::max<int64_t>(low - key0, 0), keys);
  *to = std::min(std::max<int64_t>(high - key0, 0), keys);
}

enum { PLAIN = 0, BIAS = 1, CAP = 2 };

// The score of a key: KIND is fixed at compile time, so the plain loop stays as tight as it was.
template <int KIND>
static inline float score(float raw, float scale, const float* bias, float at_query, float cap) {
  if (KIND == BIAS) return raw * scale + (*bias - at_query);
  if (KIND == CAP) return cap * fast_tanh(raw * scale / cap);
  return raw * scale;
}

// s[batch, group * rows, keys] raw scores -> probabilities; lse[batch, group * rows] = log of the softmax's denominator,
// computed unless it is `known`.
template <class T, int KIND>
static void softmax(T* s, float* lse, int64_t batch, int64_t group, int64_t rows, int64_t keys, int64_t first,
                    int64_t key0, int64_t window, float scale, bool known, const Extra& extra) {
#pragma omp parallel for schedule(static) if (batch * group * rows * keys > SERIAL)
  for (int64_t r = 0; r < batch * group * rows; ++r) {
    T* p = s + r * keys;
    int64_t from, to, query = first + r % rows, head = r / rows;
    visible(query, keys, window, key0, extra.prefix, &from, &to);
    const float* bias = KIND == BIAS ? extra.bias + head * extra.positions + key0 : nullptr;
    float at_query = KIND == BIAS ? extra.bias[head * extra.positions + query] : 0.0f, cap = extra.cap;
    if (!known) {
      float top = -INFINITY;
      if (KIND == PLAIN) {
#pragma omp simd reduction(max : top)
        for (int64_t j = from; j < to; ++j) top = std::max(top, load(p + j));
        top *= scale;
      } else {
#pragma omp simd reduction(max : top)
        for (int64_t j = from; j < to; ++j) top = std::max(top, score<KIND>(load(p + j), scale, bias + j, at_query, cap));
      }
      if (extra.sinks) top = std::max(top, extra.sinks[head]);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = from; j < to; ++j)
        sum += fast_exp(score<KIND>(load(p + j), scale, bias + j, at_query, cap) - top);
      if (extra.sinks) sum += fast_exp(extra.sinks[head] - top);
      lse[r] = top + std::log(sum);
    }
    float l = lse[r];
    for (int64_t j = 0; j < from; ++j) store(p + j, 0.0f);
#pragma omp simd
    for (int64_t j = from; j < to; ++j)
      store(p + j, fast_exp(score<KIND>(load(p + j), scale, bias + j, at_query, cap) - l));
    for (int64_t j = to; j < keys; ++j) store(p + j, 0.0f);
  }
}

// dp -> ds = scale * p * (dp - sum(p * dp)), in place; p is zero where hidden, so hidden keys get zero.
// dots[r] = sum(p * dp) where asked for. Under a cap the score is found again as log p + lse.
template <class T>
static void softmax_backward(const T* p, T* dp, const float* lse, float* dots, int64_t total_rows, int64_t keys,
                             float scale, float cap) {
#pragma omp parallel for schedule(static) if (total_rows * keys > SERIAL)
  for (int64_t r = 0; r < total_rows; ++r) {
    const T* pr = p + r * keys;
    T* dr = dp + r * keys;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < keys; ++j) dot += load(pr + j) * load(dr + j);
    if (dots) dots[r] = dot;
    if (cap > 0.0f) {
      for (int64_t j = 0; j < keys; ++j) {
        float pj = load(pr + j), t = pj > 0.0f ? (std::log(pj) + lse[r]) / cap : 1.0f;
        store(dr + j, scale * pj * (load(dr + j) - dot) * (1.0f - t * t));
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < keys; ++j) store(dr + j, scale * load(pr + j) * (load(dr + j) - dot));
    }
  }
}

#define EXPORT(T, suffix)                                                                                                \
  extern "C" void softmax_##suffix(T* s, float* lse, int64_t batch, int64_t group, int64_t rows, int64_t keys,           \
                                   int64_t first, int64_t key0, int64_t window, float scale, int known,                  \
                                   const float* bias, int64_t positions, float cap, const float* sinks,                  \
                                   int64_t prefix) {                                                                     \
    Extra extra{bias, positions, cap, sinks, prefix};                                                                    \
    auto run = bias ? softmax<T, BIAS> : cap > 0.0f ? softmax<T, CAP> : softmax<T, PLAIN>;                               \
    run(s, lse, batch, group, rows, keys, first, key0, window, scale, known != 0, extra);                                \
  }                                                                                                                      \
  extern "C" void softmax_backward_##suffix(const T* p, T* dp, const float* lse, float* dots, int64_t total_rows,        \
                                            int64_t keys, float scale, float cap) {                                      \
    softmax_backward<T>(p, dp, lse, dots, total_rows, keys, scale, cap);                                                 \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
