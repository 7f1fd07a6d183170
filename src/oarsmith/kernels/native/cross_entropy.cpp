// Cross-entropy with its gradient.
#include "common.h"

// logits[rows, vocab] -> logits become d(sum_r coef[r] * (z * lse[r]^2 - logp[r])) / d logits when want_grad, else stay.
// With a cap, logits are first bent to cap * tanh(logit / cap).
// logp[r] = log-probability of targets[r]; correct[r] = 1 where the target has the largest logit; lse[r] = the logarithm
// of the softmax's denominator.
template <class T>
static void cross_entropy(T* logits, const int64_t* targets, const float* coef, float* logp, uint8_t* correct,
                          float* lses, int64_t rows, int64_t vocab, int want_grad, float cap, float z) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    T* x = logits + r * vocab;
    if (cap > 0.0f) {
#pragma omp simd
      for (int64_t j = 0; j < vocab; ++j) store(x + j, cap * fast_tanh(load(x + j) / cap));
    }
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < vocab; ++j) top = std::max(top, load(x + j));
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < vocab; ++j) sum += fast_exp(load(x + j) - top);
    float lse = top + std::log(sum), target = load(x + targets[r]);
    logp[r] = target - lse;
    correct[r] = target >= top;
    lses[r] = lse;
    if (!want_grad) continue;
    // Without the z term the factor is 1 even where lse is infinite.
    float c = coef[r], pull = z > 0.0f ? 1.0f + 2.0f * z * lse : 1.0f, cp = c * pull;
    if (cap > 0.0f) {
      float t = target / cap;
#pragma omp simd
      for (int64_t j = 0; j < vocab; ++j) {
        float y = load(x + j), slope = 1.0f - (y / cap) * (y / cap);
        store(x + j, cp * slope * fast_exp(y - lse));
      }
      store(x + targets[r], c * (1.0f - t * t) * (pull * fast_exp(target - lse) - 1.0f));
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < vocab; ++j) store(x + j, cp * fast_exp(load(x + j) - lse));
    store(x + targets[r], c * (pull * fast_exp(target - lse) - 1.0f));
  }
}

#define EXPORT(T, suffix)                                                                                                \
  extern "C" void cross_entropy_##suffix(T* logits, const int64_t* targets, const float* coef, float* logp,              \
                                         uint8_t* correct, float* lses, int64_t rows, int64_t vocab, int want_grad,      \
                                         float cap, float z) {                                                           \
    cross_entropy<T>(logits, targets, coef, logp, correct, lses, rows, vocab, want_grad, cap, z);                        \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
