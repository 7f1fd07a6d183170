// What attention is made of: its description, rotations, and the two products of a few queries in registers.
#pragma once
#include <cmath>
#include <vector>

#include "cache.h"
#include "rows.h"

// Entries of a head from `offset` on turn by a rotation; -1: none.
struct Turn {
  int64_t rotation, offset;
};

// What a layer's attention is. A buffer holds its queries head by head, and from somewhere on its keys and its values.
struct Attention {
  int64_t heads, kv_heads, key_dim, value_dim, keys_at, values_at, layer;
  Norm q_norm, k_norm;       // size 0: none; over the first entries of a head, or over all heads
  Turn turns[2];
  int64_t window;            // 0: none
  int64_t bias_positions;    // columns of `bias`
  const float* bias;         // [heads, positions]: bias[key] - bias[query] is added to a score; null: none
  const float* sinks;        // [heads]; null: none
  float scale, softcap;      // softcap 0: none
  float log_n;               // queries at position p are multiplied by max(1, log_n(p + 1)); 0: none
};

// cos and sin of a rule for every row of a step: [rows, frequencies].
struct Rotation {
  int64_t frequencies;
  bool adjacent;
  const float *cos, *sin;
};

static inline void rotate(const Rotation& rotation, int64_t row, float* x) {
  const int64_t count = rotation.frequencies;
  const float *cos = rotation.cos + row * count, *sin = rotation.sin + row * count;
  const int64_t step = rotation.adjacent ? 2 : 1, other = rotation.adjacent ? 1 : count;
  for (int64_t i = 0; i < count; ++i) {
    const float a = x[i * step], b = x[i * step + other];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + other] = b * cos[i] + a * sin[i];
  }
}

// sum + the products of a pair of bf16 entries with the same entries of 16 keys (a line of the cache).
static ALWAYS_INLINE vec16 add_pair_products(const vec16& sum, const uint8_t* line, const uint8_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, 4);
#if defined(HAS_AVX512) && defined(__AVX512BF16__)
  const __m512bh keys = (__m512bh)_mm512_loadu_si512(line), entries = (__m512bh)_mm512_set1_epi32(both);
  return vec16{{(vec16::Part)_mm512_dpbf16_ps((__m512)sum.parts[0], keys, entries)}};
#else
  const ivec16 keys = load16(reinterpret_cast<const int32_t*>(line));
  const vec16 first = bits16<float>(by_part<ivec16>([](auto u) { return u << 16; }, keys));
  const vec16 second = bits16<float>(keys & every16<int32_t>(~0xffff));
  return fma16(second, from_bf16(static_cast<uint16_t>(static_cast<uint32_t>(both) >> 16)),
               fma16(first, from_bf16(static_cast<uint16_t>(both)), sum));
#endif
}

// Scores of N queries with G groups of 16 keys that lie in a row. Two groups at once, because sums of few queries wait
// for one another.
template <Stored S, int N, int G>
static ALWAYS_INLINE void score_groups(const float* const* queries, const uint8_t* keys, int64_t dim,
                                       float* const* out) {
  const int64_t group_bytes = 16 * dim * stored_bytes(S);
  vec16 sum[N][G];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) sum[n][g] = zero16();
  if constexpr (S == Stored::F32) {
    for (int64_t i = 0; i < dim; ++i, keys += 64) {
      vec16 key[G];
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) key[g] = load16(reinterpret_cast<const float*>(keys + g * group_bytes));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) sum[n][g] = fma16(key[g], queries[n][i], sum[n][g]);
    }
  } else {
    for (int64_t i = 0; i < dim / 2; ++i, keys += 64) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
          sum[n][g] = add_pair_products(sum[n][g], keys + g * group_bytes,
                                        reinterpret_cast<const uint8_t*>(queries[n]) + 4 * i);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) store16(out[n] + 16 * g, sum[n][g]);
}

// sums[n] += probabilities[n] . values of `count` positions in a row, for entries [0, 16 W) of N queries. In bf16 the
// probabilities are bf16 too, and up to an even number of positions there are some.
template <Stored S, int N, int W>
static ALWAYS_INLINE void add_values(const float* const* probabilities, const uint8_t* values, int64_t count,
                                     int64_t dim, float* const* sums) {
  vec16 sum[N][W];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[n][w] = load16(sums[n] + 16 * w);
  if constexpr (S == Stored::F32) {
    for (int64_t i = 0; i < count; ++i, values += 4 * dim) {
      vec16 value[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) value[w] = load16(reinterpret_cast<const float*>(values) + 16 * w);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sum[n][w] = fma16(value[w], probabilities[n][i], sum[n][w]);
    }
  } else {
    for (int64_t i = 0; i < count; i += 2, values += 4 * dim) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w)
          sum[n][w] = add_pair_products(sum[n][w], values + 64 * w,
                                        reinterpret_cast<const uint8_t*>(probabilities[n]) + 2 * i);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store16(sums[n] + 16 * w, sum[n][w]);
}

// f(N, first) for all of [0, count), six at a time and then what is left at once.
static constexpr int MOST_QUERIES = 6;

template <class F, int N = MOST_QUERIES>
static ALWAYS_INLINE void left_over(int64_t count, int64_t first, F& f) {
  if (count == N)
    f(std::integral_constant<int, N>(), first);
  else if constexpr (N > 1)
    left_over<F, N - 1>(count, first, f);
}

template <class F>
static ALWAYS_INLINE void in_pieces(int64_t count, F f) {
  int64_t first = 0;
  for (; first + MOST_QUERIES < count; first += MOST_QUERIES)
    f(std::integral_constant<int, MOST_QUERIES>(), first);
  left_over<F>(count - first, first, f);
}
