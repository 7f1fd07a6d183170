// Few stripes of rows with tiles: their sums stay in tiles over all columns, and weights of 8 and 4 bits become bf16
// for each stripe anew, which is faster than to have more of them at a time than L1 holds.
#pragma once
#include "tiles.h"

#ifdef HAS_TILES

static constexpr int64_t FEW_ROWS = 64;

template <Format FORMAT, int T>
static void multiply_few_rows(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair,
                              int64_t last_pair, const Receiver& out) {
  alignas(64) uint8_t weights[2][2 * TILE_BYTES];  // what is multiplied now and next
  alignas(64) float sums[16 * T * PAIR];
  const int64_t groups = matrix.groups();
  Preparation<FORMAT, false> preparation;
  // The sums of a stripe are handed over while the next is computed, a while after the tiles went to memory.
  struct {
    int64_t pair, row, count;
  } done{0, 0, 0};
  const auto deliver = [&] {
    if (done.count > 0) out(done.pair, done.row, done.count, sums);
  };
  preparation.begin(matrix.block(2 * first_pair), matrix.block(2 * first_pair + 1), 0, weights[0]);
  for (int i = 0; i < 8; ++i) preparation.eighth(i);
  int now = 0;
  for (int64_t pair = first_pair; pair < last_pair; ++pair)
    for (int64_t row = 0; row < rows; row += 16 * T) {
      const int64_t next_pair = row + 16 * T < rows ? pair : std::min(pair + 1, last_pair - 1);
      const uint8_t *blocks[2] = {matrix.block(2 * pair), matrix.block(2 * pair + 1)}, *x = inputs.stripe(row);
      zero_sums<T>();
      for (int64_t g = 0; g < groups; ++g, now = !now, x += 2 * TILE_BYTES) {
        if (g + 1 < groups)
          preparation.begin(blocks[0], blocks[1], g + 1, weights[!now]);
        else
          preparation.begin(matrix.block(2 * next_pair), matrix.block(2 * next_pair + 1), 0, weights[!now]);
        const uint8_t *left = weights[now], *right = left + TILE_BYTES;
        if constexpr (FORMAT == BF16) left = blocks[0] + g * TILE_BYTES, right = blocks[1] + g * TILE_BYTES;
        if (g == std::min<int64_t>(2, groups - 1)) deliver();
        memory_changed();
        add_products<T>(x, left, right, [&](int i) __attribute__((always_inline)) {
          constexpr int EACH = 8 / (2 * T);
#pragma GCC unroll 4
          for (int e = 0; e < EACH; ++e) preparation.eighth(i * EACH + e);
        });
      }
      store_sums<T>(sums);
      memory_changed();
      done = {pair, row, std::min<int64_t>(16 * T, rows - row)};
    }
  deliver();
}

#endif
