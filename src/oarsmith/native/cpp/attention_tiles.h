// The two products of attention with AMX's tiles, for blocks of many queries: keys and values lie in the cache as tiles
// want them (cache.h), 32 entries or positions times 16.
#pragma once
#include "cache.h"
#include "tiles.h"

// From how many queries on tiles are faster than sums in registers; they take 32 at a time.
static constexpr int64_t FEWEST_QUERIES_FOR_TILES = 12, QUERIES_OF_TILES = 32;

#ifdef HAS_TILES

// C tiles of 16 columns for 32 rows: rows of `left` are `left_bytes` apart, lines of `right` `right_bytes`; the next 16
// columns of `right` are `next_bytes` further. `out` has rows of `out_bytes`, and is added to where `add` says so.
template <int C>
static void tile_product(const uint8_t* left, int64_t left_bytes, const uint8_t* right, int64_t right_bytes,
                         int64_t next_bytes, int64_t steps, int64_t step_bytes, float* out, int64_t out_bytes, bool add) {
  uint8_t* upper = reinterpret_cast<uint8_t*>(out);
  uint8_t* lower = upper + 16 * out_bytes;
  if (add) {
    _tile_loadd(0, upper, out_bytes);
    _tile_loadd(2, lower, out_bytes);
    if constexpr (C > 1) _tile_loadd(1, upper + LINE, out_bytes);
    if constexpr (C > 1) _tile_loadd(3, lower + LINE, out_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (C > 1) _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i, left += LINE, right += step_bytes) {
    _tile_loadd(4, left, left_bytes);
    _tile_loadd(6, right, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + 16 * left_bytes, left_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (C > 1) _tile_loadd(7, right + next_bytes, right_bytes);
    if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, upper, out_bytes);
  _tile_stored(2, lower, out_bytes);
  if constexpr (C > 1) _tile_stored(1, upper + LINE, out_bytes);
  if constexpr (C > 1) _tile_stored(3, lower + LINE, out_bytes);
}

// Scores of 32 queries (bf16, `query_bytes` apart) with `groups` groups of 16 keys in a row.
static inline void score_tiles(const uint8_t* queries, int64_t query_bytes, const uint8_t* keys, int64_t groups,
                               int64_t dim, float* out, int64_t out_bytes) {
  const int64_t group_bytes = 32 * dim, steps = dim / 32, step_bytes = 16 * LINE;
  for (; groups >= 2; groups -= 2, keys += 2 * group_bytes, out += 32)
    tile_product<2>(queries, query_bytes, keys, LINE, group_bytes, steps, step_bytes, out, out_bytes, false);
  if (groups) tile_product<1>(queries, query_bytes, keys, LINE, 0, steps, step_bytes, out, out_bytes, false);
}

// sums += probabilities (bf16) . values of `blocks` times 32 positions in a row.
static inline void add_value_tiles(const uint8_t* probabilities, int64_t probability_bytes, const uint8_t* values,
                                   int64_t blocks, int64_t dim, float* sums) {
  const int64_t line_bytes = 4 * dim, step_bytes = 16 * line_bytes;
  int64_t column = 0;
  for (; column + 32 <= dim; column += 32)
    tile_product<2>(probabilities, probability_bytes, values + 4 * column, line_bytes, LINE, blocks, step_bytes,
                    sums + column, line_bytes, true);
  if (column < dim)
    tile_product<1>(probabilities, probability_bytes, values + 4 * column, line_bytes, 0, blocks, step_bytes,
                    sums + column, line_bytes, true);
}

#endif
