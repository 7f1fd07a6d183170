// Attention of a step's rows over the pages of their sequences, one kv head and a block of rows at a time.
// A block's queries (its rows times the query heads that share the kv head) go through the keys together, CHUNK at a
// time, with a running maximum and sum (Milakov and Gimelshein 2018), so memory does not grow with the context.
#pragma once
#include <algorithm>
#include <limits>

#include "attention.h"
#include "attention_tiles.h"

static constexpr int64_t CHUNK = 256;

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
  std::vector<uint8_t> values, unrounded;
};

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
        const uint8_t* keys = cache_.keys<S>(layer_, page, kv, offset, to - from, scratch_.unrounded);
        score(keys, from - start, to - from, tiles);
      });
      weigh(start, stop);
      in_pages(start, stop, [&](int64_t from, int64_t to, int64_t page, int64_t offset) {
        const uint8_t* values = cache_.values<S>(layer_, page, kv, offset, to - from, scratch_.unrounded);
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
