// The products of one pair of blocks with a few rows, in plain vectors.
#pragma once
#include "inputs.h"

static constexpr int64_t TILE_ROWS = 4;

// The next column of 16 rows, from the 32-bit words of a line: the c-th of its `4 / size` columns.
static ALWAYS_INLINE vec16 bf16_column(const ivec16& line, int c) {
  return bits16<float>(by_part<ivec16>([c](auto u) { return c ? u & ~0xffff : u << 16; }, line));
}
static ALWAYS_INLINE vec16 int8_column(const ivec16& line, int c) {
  return convert16<float>(by_part<ivec16>([c](auto u) { return ((u >> (8 * c)) & 255) - 128; }, line));
}
static ALWAYS_INLINE vec16 int4_column(const ivec16& line, int c) {
  return convert16<float>(by_part<ivec16>([c](auto u) { return (u >> (8 * (c % 4) + c / 4 * 4)) & 15; }, line));
}
static ALWAYS_INLINE ivec16 load_line(const uint8_t* line) { return load16(reinterpret_cast<const int32_t*>(line)); }
static ALWAYS_INLINE vec16 load_halves(const uint8_t* x) { return from_fp16(reinterpret_cast<const uint16_t*>(x)); }

// Calls each(column, weights) for the 32 columns of a group of a block.
template <Format FORMAT, class Each>
static ALWAYS_INLINE void group_columns(const uint8_t* block, int64_t group, Each&& each) {
  if constexpr (FORMAT == F32) {
    for (int c = 0; c < 32; ++c) each(c, load16(reinterpret_cast<const float*>(block + (group * 32 + c) * LINE)));
  } else if constexpr (FORMAT == BF16) {
    for (int i = 0; i < 16; ++i) {
      const ivec16 line = load_line(block + (group * 16 + i) * LINE);
      for (int c = 0; c < 2; ++c) each(2 * i + c, bf16_column(line, c));
    }
  } else if constexpr (FORMAT == INT8) {
    const vec16 scale = load_halves(block + int8_scales(group));
    for (int i = 0; i < 8; ++i) {
      const ivec16 line = load_line(block + int8_lines(group) + i * LINE);
      for (int c = 0; c < 4; ++c) each(4 * i + c, int8_column(line, c) * scale);
    }
  } else {
    const vec16 scale = load_halves(block + int4_scales(group)), low = load_halves(block + int4_lows(group));
    for (int i = 0; i < 4; ++i) {
      const ivec16 line = load_line(block + int4_lines(group) + i * LINE);
      for (int c = 0; c < 8; ++c) each(8 * i + c, fma16(int4_column(line, c), scale, low));
    }
  }
}

template <Format FORMAT, int R>
static void plain_products(const Matrix& matrix, const Inputs& inputs, int64_t pair, int64_t row, vec16 (*sums)[2]) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* block = matrix.block(2 * pair + half);
    vec16 sum[R] = {};
    for (int64_t g = 0; g < matrix.groups(); ++g)
      group_columns<FORMAT>(block, g, [&](int c, const vec16& weights) {
        for (int r = 0; r < R; ++r) sum[r] = fma16(weights, inputs.floats(row + r)[32 * g + c], sum[r]);
      });
    for (int r = 0; r < R; ++r) sums[r][half] = sum[r];
  }
}

template <Format FORMAT>
static void some_products(const Matrix& matrix, const Inputs& inputs, int64_t pair, int64_t row, int64_t count,
                          vec16 (*sums)[2]) {
  switch (count) {
    case 1: return plain_products<FORMAT, 1>(matrix, inputs, pair, row, sums);
    case 2: return plain_products<FORMAT, 2>(matrix, inputs, pair, row, sums);
    case 3: return plain_products<FORMAT, 3>(matrix, inputs, pair, row, sums);
    default: return plain_products<FORMAT, 4>(matrix, inputs, pair, row, sums);
  }
}

// sums[r][half] = the 16 outputs of block 2 * pair + half for the row row + r; count <= TILE_ROWS.
static void products(const Matrix& matrix, const Inputs& inputs, int64_t pair, int64_t row, int64_t count,
                     vec16 (*sums)[2]) {
  switch (matrix.format) {
    case F32: return some_products<F32>(matrix, inputs, pair, row, count, sums);
    case BF16: return some_products<BF16>(matrix, inputs, pair, row, count, sums);
    case INT8: return some_products<INT8>(matrix, inputs, pair, row, count, sums);
    case INT4: return some_products<INT4>(matrix, inputs, pair, row, count, sums);
  }
}
