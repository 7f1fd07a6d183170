// One-pass AdamW on fp32 parameters or on bf16 parameters with exact fp32 masters.
#include "common.h"

struct Rule { float lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale; };

static inline float adamw(float p, float g, float* m, float* v, const Rule& k) {
  g *= k.grad_scale;
  float m1 = *m + (g - *m) * (1.0f - k.beta1);
  float v1 = *v * k.beta2 + g * g * (1.0f - k.beta2);
  *m = m1;
  *v = v1;
  p -= p * k.lr * k.decay;
  return p - k.lr * (m1 / k.correction1) / (std::sqrt(v1 / k.correction2) + k.eps);
}

extern "C" void adamw_f32(float* p, const float* g, float* m, float* v, int64_t n, float lr, float beta1, float beta2,
                          float eps, float decay, float correction1, float correction2, float grad_scale) {
  Rule k{lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale};
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) p[i] = adamw(p[i], g[i], m + i, v + i, k);
}

// The fp32 master is (parameter bits << 16) + low, with low a signed 16-bit remainder: 2 bytes instead of 4, and exact.
template <class G>
static void adamw_split(bf16* p, int16_t* low, const G* g, float* m, float* v, int64_t n, const Rule& k) {
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = (static_cast<uint32_t>(p[i].bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low[i]));
    float master;
    std::memcpy(&master, &bits, 4);
    master = adamw(master, load(g + i), m + i, v + i, k);
    std::memcpy(&bits, &master, 4);
    uint32_t high = (bits + 0x8000u) >> 16;
    p[i].bits = static_cast<uint16_t>(high);
    low[i] = static_cast<int16_t>(static_cast<uint16_t>(bits));  // bits - (high << 16) as a signed remainder
  }
}

#define SPLIT(G, suffix)                                                                                                 \
  extern "C" void adamw_split_##suffix(bf16* p, int16_t* low, const G* g, float* m, float* v, int64_t n, float lr,       \
                                       float beta1, float beta2, float eps, float decay, float correction1,             \
                                       float correction2, float grad_scale) {                                           \
    adamw_split<G>(p, low, g, m, v, n, Rule{lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale});        \
  }
SPLIT(float, f32)
SPLIT(bf16, bf16)
