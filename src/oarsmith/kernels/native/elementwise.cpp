// RMSNorm, rotary embedding and gated activations, forward and backward, for fp32 and bf16 tensors.
// Arithmetic is fp32; every loop over rows has a static schedule, so results do not change from run to run.
#include "common.h"

// y = x * rstd * w (or (1 + w)); rstd_out[rows] is kept for backward.
// Without unit_offset the normalised value is rounded to T before the weight is applied, as the Llama reference does.
template <class T>
static void rms_forward(const T* x, const T* w, T* y, float* rstd, int64_t rows, int64_t dim, int64_t stride, float eps,
                        int unit_offset) {
#pragma omp parallel for schedule(static) if (rows * dim > SERIAL)
  for (int64_t r = 0; r < rows; ++r) {
    const T* xr = x + r * stride;
    T* yr = y + r * dim;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) { float v = load(xr + i); sum += v * v; }
    float s = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
    rstd[r] = s;
    if (unit_offset) {
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) store(yr + i, load(xr + i) * s * (1.0f + load(w + i)));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) {
        T rounded;
        store(&rounded, load(xr + i) * s);
        store(yr + i, load(&rounded) * load(w + i));
      }
    }
  }
}

// dx for each row, and dw summed over rows into partial[threads, dim] when partial is given.
template <class T>
static void rms_backward(const T* dy, const T* x, const T* w, const float* rstd, T* dx, float* partial, int64_t rows,
                         int64_t dim, int64_t stride, int unit_offset, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int id = omp_get_thread_num(), team = omp_get_num_threads();  // may be fewer than asked for
    int64_t begin = rows * id / team, end = rows * (id + 1) / team;
    float* dw = partial ? partial + id * dim : nullptr;
    float offset = unit_offset ? 1.0f : 0.0f;
    for (int64_t r = begin; r < end; ++r) {
      const T *dyr = dy + r * dim, *xr = x + r * stride;
      T* dxr = dx + r * dim;
      float s = rstd[r], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < dim; ++i) dot += load(dyr + i) * (load(w + i) + offset) * load(xr + i);
      float c = dot * s * s / static_cast<float>(dim);
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) {
        float v = load(xr + i);
        store(dxr + i, s * (load(dyr + i) * (load(w + i) + offset) - v * c));
      }
      if (dw) {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) dw[i] += load(dyr + i) * load(xr + i) * s;
      }
    }
  }
}

// out[t, h, :] = rotate(x[t, h, :]); pairs (i, i + F), or (2i, 2i + 1) if adjacent. Elements from 2F on are copied.
// sign = -1 is the inverse rotation.
template <class T>
static void rope_apply(const T* x, T* out, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t dim,
                       int64_t freqs, int64_t stride_t, int64_t stride_h, float sign, int adjacent) {
#pragma omp parallel for schedule(static) if (tokens * heads * dim > SERIAL)
  for (int64_t t = 0; t < tokens; ++t) {
    const float *c = cos + t * freqs, *s = sin + t * freqs;
    for (int64_t h = 0; h < heads; ++h) {
      const T* a = x + t * stride_t + h * stride_h;
      T* o = out + (t * heads + h) * dim;
      if (adjacent) {
#pragma omp simd
        for (int64_t i = 0; i < freqs; ++i) {
          float u = load(a + 2 * i), v = load(a + 2 * i + 1), si = sign * s[i];
          store(o + 2 * i, u * c[i] - v * si);
          store(o + 2 * i + 1, v * c[i] + u * si);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < freqs; ++i) {
          float u = load(a + i), v = load(a + freqs + i), si = sign * s[i];
          store(o + i, u * c[i] - v * si);
          store(o + freqs + i, v * c[i] + u * si);
        }
      }
      for (int64_t i = 2 * freqs; i < dim; ++i) o[i] = a[i];
    }
  }
}

enum { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

template <int ACT> static inline float act(float x) {
  if (ACT == SILU) return x * sigmoid(x);
  if (ACT == GELU) return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
  if (ACT == GELU_TANH) return 0.5f * x * (1.0f + fast_tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  return x < 0.0f ? 0.0f : x;  // in this order a NaN stays
}
template <int ACT> static inline float act_grad(float x) {
  if (ACT == SILU) { float s = sigmoid(x); return s * (1.0f + x * (1.0f - s)); }
  if (ACT == GELU) {
    float cdf = 0.5f * (1.0f + std::erf(x * 0.70710678118654752f));
    return cdf + x * 0.39894228040143268f * fast_exp(-0.5f * x * x);
  }
  if (ACT == GELU_TANH) {
    float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x), t = fast_tanh(inner);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456080286536f * (1.0f + 3.0f * 0.044715f * x * x);
  }
  return x <= 0.0f ? 0.0f : 1.0f;
}

// out[t, i] = act(gu[t, i]) * gu[t, inner + i]
template <class T, int ACT> static void gated_forward(const T* gu, T* out, int64_t tokens, int64_t inner) {
#pragma omp parallel for schedule(static) if (tokens * inner > SERIAL)
  for (int64_t t = 0; t < tokens; ++t) {
    const T *g = gu + t * 2 * inner, *u = g + inner;
    T* o = out + t * inner;
#pragma omp simd
    for (int64_t i = 0; i < inner; ++i) store(o + i, act<ACT>(load(g + i)) * load(u + i));
  }
}
template <class T, int ACT> static void gated_backward(const T* dout, const T* gu, T* dgu, int64_t tokens, int64_t inner) {
#pragma omp parallel for schedule(static) if (tokens * inner > SERIAL)
  for (int64_t t = 0; t < tokens; ++t) {
    const T *g = gu + t * 2 * inner, *u = g + inner, *d = dout + t * inner;
    T *dg = dgu + t * 2 * inner, *du = dg + inner;
#pragma omp simd
    for (int64_t i = 0; i < inner; ++i) {
      float gate = load(g + i), grad = load(d + i);
      store(dg + i, grad * load(u + i) * act_grad<ACT>(gate));
      store(du + i, grad * act<ACT>(gate));
    }
  }
}

#define GATED_FORWARD(T, A) gated_forward<T, A>(gu, out, tokens, inner)
#define GATED_BACKWARD(T, A) gated_backward<T, A>(dout, gu, dgu, tokens, inner)
#define EXPORT(T, suffix)                                                                                                \
  extern "C" void rms_forward_##suffix(const T* x, const T* w, T* y, float* rstd, int64_t rows, int64_t dim,             \
                                       int64_t stride, float eps, int unit_offset) {                                     \
    rms_forward<T>(x, w, y, rstd, rows, dim, stride, eps, unit_offset);                                                  \
  }                                                                                                                      \
  extern "C" void rms_backward_##suffix(const T* dy, const T* x, const T* w, const float* rstd, T* dx, float* partial,   \
                                        int64_t rows, int64_t dim, int64_t stride, int unit_offset, int threads) {       \
    rms_backward<T>(dy, x, w, rstd, dx, partial, rows, dim, stride, unit_offset, threads);                               \
  }                                                                                                                      \
  extern "C" void rope_##suffix(const T* x, T* out, const float* cos, const float* sin, int64_t tokens, int64_t heads,   \
                                int64_t dim, int64_t freqs, int64_t stride_t, int64_t stride_h, float sign,              \
                                int adjacent) {                                                                          \
    rope_apply<T>(x, out, cos, sin, tokens, heads, dim, freqs, stride_t, stride_h, sign, adjacent);                      \
  }                                                                                                                      \
  extern "C" void gated_forward_##suffix(const T* gu, T* out, int64_t tokens, int64_t inner, int activation) {           \
    switch (activation) {                                                                                                \
      case SILU: GATED_FORWARD(T, SILU); break;                                                                          \
      case GELU: GATED_FORWARD(T, GELU); break;                                                                          \
      case GELU_TANH: GATED_FORWARD(T, GELU_TANH); break;                                                                \
      default: GATED_FORWARD(T, RELU);                                                                                   \
    }                                                                                                                    \
  }                                                                                                                      \
  extern "C" void gated_backward_##suffix(const T* dout, const T* gu, T* dgu, int64_t tokens, int64_t inner,             \
                                          int activation) {                                                              \
    switch (activation) {                                                                                                \
      case SILU: GATED_BACKWARD(T, SILU); break;                                                                         \
      case GELU: GATED_BACKWARD(T, GELU); break;                                                                         \
      case GELU_TANH: GATED_BACKWARD(T, GELU_TANH); break;                                                               \
      default: GATED_BACKWARD(T, RELU);                                                                                  \
    }                                                                                                                    \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
