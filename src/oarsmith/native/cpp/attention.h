// Attention of a step's rows over the pages of their sequences, one kv head and a block of rows at a time.
// A block's queries (its rows times the query heads that share the kv head) go through the keys together, CHUNK at a
// time, with a running maximum and sum (Milakov and Gimelshein 2018), so memory does not grow with the context.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_tiles.h"
#include "cache.h"
#include "rows.h"

static constexpr int64_t CHUNK = 256;

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

// Rows [first, stop) of a step that belong to one sequence.
struct RowBlock {
  int64_t first, stop;
  const int32_t* pages;
};

// One member's memory for a block.
class AttentionScratch {
 public:
  void reserve(int64_t queries, int64_t dim) {
    queries = (queries + QUERIES_OF_TILES - 1) / QUERIES_OF_TILES * QUERIES_OF_TILES;
    scores.resize(queries * CHUNK);
    sums.resize(queries * dim);
    query.resize(queries * dim);
    largest.resize(queries);
    total.resize(queries);
  }
  std::vector<float> scores, sums, query, largest, total;
  std::vector<uint8_t> values;
};

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

template <Stored S>
class AttentionBlock {
 public:
  AttentionBlock(const Attention& spec, const Cache& cache, const StepRows& rows, AttentionScratch& scratch)
      : spec_(spec), cache_(cache), layer_(cache.layer(spec.layer)), rows_(rows), scratch_(scratch) {}

  // Query heads [head, head + share) of kv head `kv` for the rows of a block. qkv and out: [rows, stride].
  void run(const RowBlock& block, int64_t kv, int64_t head, int64_t share, const Buffer& qkv, const Buffer& out) {
    block_ = &block, head_ = head, share_ = share, count_ = (block.stop - block.first) * share;
    begin(qkv);
    int64_t first = low(block.first), last = high(block.first);
    for (int64_t row = block.first + 1; row < block.stop; ++row)
      first = std::min(first, low(row)), last = std::max(last, high(row));
    // Groups of 16 keys, and blocks of 32 values, begin at multiples of their size.
    first = first / 32 * 32;
    const bool tiles = for_tiles();
#ifdef HAS_TILES
    if (tiles) {
      const Tiles configured;
      through_chunks(first, last, kv, true);
      return finish(out);
    }
#endif
    through_chunks(first, last, kv, tiles);
    finish(out);
  }

 private:
  bool for_tiles() const {
#ifdef HAS_TILES
    return S == Stored::BF16 && count_ >= FEWEST_QUERIES_FOR_TILES && spec_.key_dim % 32 == 0 &&
           cache_.page_size % 32 == 0 && tiles_allowed();
#else
    return false;
#endif
  }

  void through_chunks(int64_t first, int64_t last, int64_t kv, bool tiles) {
    for (int64_t start = first, stop; start <= last; start = stop) {
      stop = std::min(start + CHUNK, last + 1);
      in_pages(start, stop, [&](int64_t from, int64_t to, int64_t page, int64_t offset) {
        const uint8_t* keys = cache_.keys(layer_, page, kv) + offset * spec_.key_dim * stored_bytes(S);
        score(keys, from - start, to - from, tiles);
      });
      weigh(start, stop);
      in_pages(start, stop, [&](int64_t from, int64_t to, int64_t page, int64_t offset) {
        const uint8_t* values = cache_.values(layer_, page, kv) + offset * spec_.value_dim * stored_bytes(S);
        add(values, from - start, to - from, tiles);
      });
    }
  }

  // Each part of [start, stop) that lies in one page.
  template <class F>
  void in_pages(int64_t start, int64_t stop, F f) const {
    for (int64_t from = start, to; from < stop; from = to) {
      to = std::min((from / cache_.page_size + 1) * cache_.page_size, stop);
      const int64_t page = block_->pages[from / cache_.page_size];
      // A page wholly behind the window has been given away.
      if (page >= 0) f(from, to, page, from % cache_.page_size);
    }
  }

  int64_t row_of(int64_t query) const { return block_->first + query / share_; }
  int64_t head_of(int64_t query) const { return head_ + query % share_; }
  // The first and the last place that a row sees.
  int64_t low(int64_t row) const {
    const int64_t least = rows_.lows == nullptr ? 0 : rows_.lows[row];
    return spec_.window ? std::max<int64_t>(least, rows_.places[row] - spec_.window + 1) : least;
  }
  int64_t high(int64_t row) const { return rows_.highs == nullptr ? rows_.places[row] : rows_.highs[row]; }
  float* scores(int64_t query) const { return scratch_.scores.data() + query * CHUNK; }
  float* sums(int64_t query) const { return scratch_.sums.data() + query * spec_.value_dim; }
  float* query(int64_t query) const { return scratch_.query.data() + query * spec_.key_dim; }

  void begin(const Buffer& qkv) {
    scratch_.reserve(count_, std::max(spec_.key_dim, spec_.value_dim));
    std::fill_n(scratch_.sums.data(), count_ * spec_.value_dim, 0.0f);
    for (int64_t n = 0; n < count_; ++n) {
      const float* x = qkv.row(row_of(n)) + head_of(n) * spec_.key_dim;
      // A sink takes part in the softmax like a key without a value. No maximum is -inf: -inf - -inf is a NaN.
      scratch_.largest[n] = spec_.sinks ? std::max(spec_.sinks[head_of(n)], -1e30f) : -1e30f;
      scratch_.total[n] = spec_.sinks ? std::exp(spec_.sinks[head_of(n)] - scratch_.largest[n]) : 0.0f;
      for (int64_t i = 0; i < spec_.key_dim; i += 16) {
        if constexpr (S == Stored::F32)
          store16(query(n) + i, load16(x + i));
        else
          to_bf16(load16(x + i), reinterpret_cast<uint16_t*>(query(n)) + i);
      }
    }
  }

  // Scores with `count` keys from place `at` of the chunk on.
  void score(const uint8_t* keys, int64_t at, int64_t count, bool tiles) {
    const int64_t group_bytes = 16 * spec_.key_dim * stored_bytes(S), groups = (count + 15) / 16;
#ifdef HAS_TILES
    if (tiles) {
      for (int64_t n = 0; n < count_; n += QUERIES_OF_TILES)
        score_tiles(reinterpret_cast<const uint8_t*>(query(n)), 4 * spec_.key_dim, keys, groups, spec_.key_dim,
                    scores(n) + at, 4 * CHUNK);
      return;
    }
#endif
    in_pieces(count_, [&](auto size, int64_t first) {
      constexpr int N = decltype(size)::value;
      const float* queries[N];
      float* out[N];
      for (int n = 0; n < N; ++n) queries[n] = query(first + n), out[n] = scores(first + n) + at;
      int64_t group = 0;
      for (; group + 2 <= groups; group += 2) {
        score_groups<S, N, 2>(queries, keys + group * group_bytes, spec_.key_dim, out);
        for (int n = 0; n < N; ++n) out[n] += 32;
      }
      if (group < groups) score_groups<S, N, 1>(queries, keys + group * group_bytes, spec_.key_dim, out);
    });
  }

  // Scores to exp(score - largest), what is not seen to 0.
  void weigh(int64_t start, int64_t stop) {
    for (int64_t n = 0; n < count_; ++n) {
      const int64_t row = row_of(n), wide = (stop - start + 31) / 32 * 32;
      const int64_t from = low(row) - start, to = std::min(stop, high(row) + 1) - start;
      float* x = scores(n);
      bend(x, n, start, std::min(wide, to), wide);
      for (int64_t i = 0; i < std::min(from, wide); ++i) x[i] = -std::numeric_limits<float>::infinity();
      for (int64_t i = std::max<int64_t>(to, 0); i < wide; ++i) x[i] = -std::numeric_limits<float>::infinity();
      vec16 largest = all16(scratch_.largest[n]);
      for (int64_t i = 0; i < wide; i += 16) largest = max16(load16(x + i), largest);
      const float now = max_of16(largest);
      const float shrink = std::exp(scratch_.largest[n] - now);
      vec16 total = zero16();
      for (int64_t i = 0; i < wide; i += 16) {
        vec16 p = exp16(load16(x + i) - now);
        if constexpr (S == Stored::BF16) {
          // They move together at the row's beginning. The total is of the rounded ones, which the values get.
          uint16_t rounded[16];
          to_bf16(p, rounded);
          p = from_bf16(rounded);
          std::memcpy(reinterpret_cast<uint8_t*>(x) + 2 * i, rounded, 32);
        } else {
          store16(x + i, p);
        }
        total += p;
      }
      scratch_.largest[n] = now;
      scratch_.total[n] = scratch_.total[n] * shrink + sum16(total);
      if (shrink != 1.0f)
        for (int64_t i = 0; i < spec_.value_dim; i += 16) store16(sums(n) + i, load16(sums(n) + i) * shrink);
    }
  }

  // Soft cap, and bias up to `to`. Queries come scaled.
  void bend(float* x, int64_t n, int64_t start, int64_t to, int64_t wide) const {
    if (spec_.softcap != 0.0f)
      for (int64_t i = 0; i < wide; i += 16)
        store16(x + i, tanh16(load16(x + i) * (1.0f / spec_.softcap)) * spec_.softcap);
    if (spec_.bias == nullptr) return;
    const float *bias = spec_.bias + head_of(n) * spec_.bias_positions, own = bias[rows_.places[row_of(n)]];
    for (int64_t i = 0; i < to; ++i) x[i] += bias[start + i] - own;
  }

  // The values of `count` places from `at` of the chunk on.
  void add(const uint8_t* values, int64_t at, int64_t count, bool tiles) {
    const int64_t row_bytes = spec_.value_dim * stored_bytes(S);
#ifdef HAS_TILES
    if (tiles) {
      const int64_t blocks = count / 32, left = count % 32;
      add_tiles(values, at, blocks);
      if (left == 0) return;
      // What lies behind the last place has probability 0, but may be no number.
      std::vector<uint8_t>& padded = scratch_.values;
      padded.assign(32 * row_bytes, 0);
      std::memcpy(padded.data(), values + blocks * 32 * row_bytes, (left + 1) / 2 * 2 * row_bytes);
      return add_tiles(padded.data(), at + 32 * blocks, 1);
    }
#endif
    for (int64_t column = 0; column < spec_.value_dim;) {
      const auto some = [&](auto width) {
        constexpr int W = decltype(width)::value;
        in_pieces(count_, [&](auto size, int64_t first) {
          constexpr int N = decltype(size)::value;
          const float* p[N];
          float* sum[N];
          for (int n = 0; n < N; ++n) p[n] = probabilities(first + n, at), sum[n] = sums(first + n) + column;
          // Four bytes an entry: fp32, or pairs of bf16.
          add_values<S, N, W>(p, values + 4 * column, count, spec_.value_dim, sum);
        });
        column += 16 * W;
      };
      if (spec_.value_dim - column >= 64)
        some(std::integral_constant<int, 4>());
      else
        some(std::integral_constant<int, 1>());
    }
  }

#ifdef HAS_TILES
  void add_tiles(const uint8_t* values, int64_t at, int64_t blocks) {
    for (int64_t n = 0; n < count_ && blocks; n += QUERIES_OF_TILES)
      add_value_tiles(reinterpret_cast<const uint8_t*>(probabilities(n, at)), 4 * CHUNK, values, blocks,
                      spec_.value_dim, sums(n));
  }
#endif

  // From place `at` of the chunk on; in bf16 they stand at the beginning of the row of scores.
  const float* probabilities(int64_t query, int64_t at) const {
    return scores(query) + (S == Stored::BF16 ? at / 2 : at);
  }

  void finish(const Buffer& out) {
    for (int64_t n = 0; n < count_; ++n) {
      float* y = out.row(row_of(n)) + head_of(n) * spec_.value_dim;
      for (int64_t i = 0; i < spec_.value_dim; i += 16) store16(y + i, load16(sums(n) + i) * (1.0f / scratch_.total[n]));
    }
  }

  const Attention& spec_;
  const Cache& cache_;
  const CacheLayer& layer_;
  const StepRows& rows_;
  AttentionScratch& scratch_;
  const RowBlock* block_ = nullptr;
  int64_t head_ = 0, share_ = 0, count_ = 0;
};
