// What stands between two linear maps.
#pragma once
#include "vec.h"

enum class Activation : int32_t { NONE, SILU, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SWIGLU, SIGMOID, CAP };

// Absolute error below 2e-7 (Abramowitz and Stegun 7.1.26).
static ALWAYS_INLINE vec16 erf16(const vec16& x) {
  const vec16 size = abs16(x), t = all16(1.0f) / fma16(size, 0.3275911f, all16(1.0f));
  vec16 p = fma16(t, 1.061405429f, all16(-1.453152027f));
  p = fma16(p, t, all16(1.421413741f));
  p = fma16(p, t, all16(-0.284496736f));
  p = fma16(p, t, all16(0.254829592f));
  const vec16 y = all16(1.0f) - p * t * exp16(-(size * size));
  return where16(x < zero16(), -y, y);
}

static ALWAYS_INLINE vec16 sigmoid16(const vec16& x) { return all16(1.0f) / (exp16(-x) + 1.0f); }

// CAP: limit * tanh(x / limit).
static inline vec16 activate(Activation kind, const vec16& x, float limit = 0.0f) {
  switch (kind) {
    case Activation::SIGMOID: return sigmoid16(x);
    case Activation::CAP: return tanh16(x * (1.0f / limit)) * limit;
    case Activation::SILU: return x * sigmoid16(x);
    case Activation::GELU: return x * 0.5f * (erf16(x * 0.70710678118654752f) + 1.0f);
    case Activation::GELU_TANH: {
      const vec16 inner = fma16(x * x * x, 0.044715f, x) * 0.79788456080286536f;
      return x * 0.5f * (tanh16(inner) + 1.0f);
    }
    case Activation::RELU: return max16(x, zero16());
    case Activation::RELU2: {
      const vec16 y = max16(x, zero16());
      return y * y;
    }
    default: return x;
  }
}

// gate * sigmoid(alpha * gate) * (up + 1), the gate clamped above and `up` on both sides by the limit (gpt-oss).
static inline vec16 clamped_swiglu(const vec16& gate, const vec16& up, float alpha, float limit) {
  const vec16 g = min16(gate, all16(limit)), u = max16(min16(up, all16(limit)), all16(-limit));
  return g * sigmoid16(g * alpha) * (u + 1.0f);
}
