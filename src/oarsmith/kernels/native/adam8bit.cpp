// One-pass AdamW whose moments are stored in 8 bits: per block of 256 numbers a scale, per number an index into a map of
// 256 values (see kernels/adam8bit.py, which makes the tables).
#include "common.h"

static const int64_t BLOCK = 256;
// Magnitudes below 2^-23 are nearer to 0 than to any other value of either map; keys count from there.
static const uint32_t LOWEST = 104u << 23, HIGHEST = 127u << 23;
static const int KEY_SHIFT = 16;

struct Rule { float lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale; };

// Magnitudes of a map, ascending from 0; bounds[i] is the midpoint of value i and i + 1. first[key] is the index of the
// least number with these leading bits; with 7 bits of fraction no key holds two bounds, so it is right or one too low.
struct Map { const float* values; const float* bounds; const int32_t* first; };

static inline int32_t nearest(float magnitude, const Map& map) {
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits = bits < LOWEST ? LOWEST : bits;
  bits = bits > HIGHEST ? HIGHEST : bits;  // also what is not a number
  int32_t index = map.first[(bits - LOWEST) >> KEY_SHIFT];
  return index + (magnitude > map.bounds[index]);
}

static inline float inverse(float largest) { return 1.0f / (largest > 1e-38f ? largest : 1e-38f); }

static inline float join(const bf16* p, const int16_t* low, int64_t i) {
  uint32_t bits = (static_cast<uint32_t>(p[i].bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low[i]));
  float master;
  std::memcpy(&master, &bits, 4);
  return master;
}
static inline float join(const float* p, const int16_t*, int64_t i) { return p[i]; }
static inline void split(float master, bf16* p, int16_t* low, int64_t i) {
  uint32_t bits;
  std::memcpy(&bits, &master, 4);
  p[i].bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  low[i] = static_cast<int16_t>(static_cast<uint16_t>(bits));
}
static inline void split(float master, float* p, int16_t*, int64_t i) { p[i] = master; }

template <class P, class G>
static void block(P* p, int16_t* low, const G* g, uint8_t* q1, uint8_t* q2, float* scale1, float* scale2, int64_t n,
                  const Map& signed_map, const Map& unsigned_map, const Rule& k) {
  float m[BLOCK], v[BLOCK];
  float old1 = *scale1, old2 = *scale2, largest1 = 0.0f, largest2 = 0.0f;
#pragma omp simd reduction(max : largest1, largest2)
  for (int64_t i = 0; i < n; ++i) {
    int32_t code = static_cast<int32_t>(q1[i]) - 127;
    float magnitude = signed_map.values[code < 0 ? -code : code] * old1;
    float m0 = code < 0 ? -magnitude : magnitude;
    float v0 = unsigned_map.values[q2[i]] * old2;
    float grad = load(g + i) * k.grad_scale;
    m[i] = m0 + (grad - m0) * (1.0f - k.beta1);
    v[i] = v0 * k.beta2 + grad * grad * (1.0f - k.beta2);
    float size = std::fabs(m[i]);
    largest1 = size > largest1 ? size : largest1;
    largest2 = v[i] > largest2 ? v[i] : largest2;
    float master = join(p, low, i);
    master -= master * k.lr * k.decay;
    master -= k.lr * (m[i] / k.correction1) / (std::sqrt(v[i] / k.correction2) + k.eps);
    split(master, p, low, i);
  }
  float inverse1 = inverse(largest1), inverse2 = inverse(largest2);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    int32_t code = nearest(std::fabs(m[i]) * inverse1, signed_map);
    // The signed map has a 1 and no -1.
    q1[i] = static_cast<uint8_t>(m[i] < 0.0f ? 127 - (code > 127 ? 127 : code) : 127 + code);
    q2[i] = static_cast<uint8_t>(nearest(v[i] * inverse2, unsigned_map));
  }
  *scale1 = largest1;
  *scale2 = largest2;
}

template <class P, class G>
static void all_blocks(P* p, int16_t* low, const G* g, uint8_t* q1, uint8_t* q2, float* scale1, float* scale2, int64_t n,
                       const Map& signed_map, const Map& unsigned_map, const Rule& k) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < n; start += BLOCK) {
    int64_t at = start / BLOCK;
    block(p + start, low == nullptr ? nullptr : low + start, g + start, q1 + start, q2 + start, scale1 + at, scale2 + at,
          std::min(BLOCK, n - start), signed_map, unsigned_map, k);
  }
}

// `p` is bf16 with `low` as its remainder (see adamw.cpp), or fp32 with `low` null.
#define ADAM8BIT(G, suffix)                                                                                              \
  extern "C" void adam8bit_##suffix(void* p, int16_t* low, const G* g, uint8_t* q1, uint8_t* q2, float* scale1,         \
                                    float* scale2, int64_t n, const float* values1, const float* bounds1,              \
                                    const int32_t* first1, const float* values2, const float* bounds2,                 \
                                    const int32_t* first2, float lr, float beta1, float beta2, float eps, float decay,   \
                                    float correction1, float correction2, float grad_scale) {                           \
    Map map1{values1, bounds1, first1}, map2{values2, bounds2, first2};                                                  \
    Rule k{lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale};                                          \
    if (low == nullptr) all_blocks(static_cast<float*>(p), low, g, q1, q2, scale1, scale2, n, map1, map2, k);            \
    else all_blocks(static_cast<bf16*>(p), low, g, q1, q2, scale1, scale2, n, map1, map2, k);                            \
  }
ADAM8BIT(float, f32)
ADAM8BIT(bf16, bf16)
