// A weight matrix W[rows, columns] as the products read it: blocks of 16 rows, in lines of 64 bytes that hold the next
// few columns of all 16. So one register holds a number for each of 16 outputs, and memory is read from front to back.
//
//   F32    a line is 1 column
//   BF16   a line is 2 columns: r0c0 r0c1 r1c0 r1c1 ...
//   F16    a line is 2 columns, one after the other: r0c0 r1c0 ... r0c1 r1c1 ...
//   INT8   a line is 4 columns: r0c0 r0c1 r0c2 r0c3 r1c0 ...; a byte b stands for (b - 128) * scale
//   INT4   a line is 8 columns: as INT8 with column c in the low and c + 4 in the high half of a byte, each of which
//          stands for b * scale + low; with a negative scale, low is the highest
//   E4M3   a line is 4 columns: r0c0 r0c2 r0c1 r0c3 r1c0 ..., so that a mask and a shift leave pairs; a byte is a sign,
//          4 bits of exponent (bias 7; 0: no leading one) and 3 of fraction, times the scale
//
// The last three have groups of 32 columns, with an fp16 scale (INT4: and an fp16 low) a row. INT8 and E4M3 have the
// scales of two groups in a line before these groups' 8 lines each; INT4 has scales and lows in a line before a group's
// 4 lines. E4M3's scales are kept E4M3_SCALES times as large: those of weights of size 1 are beyond fp16's full digits.
// Rows are padded to a multiple of 32 (a pair of blocks) with zeros, and columns to one of 32, where inputs are zero.
#pragma once
#include "vec.h"

enum Format : int32_t { F32, BF16, INT8, INT4, F16, E4M3 };

static constexpr int64_t BLOCK = 16, PAIR = 32, GROUP = 32, LINE = 64;

static constexpr float E4M3_SCALES = 256.0f;

// Whether weights have scales, and whether they are bytes with scales.
constexpr bool is_scaled(Format format) { return format == INT8 || format == INT4 || format == E4M3; }
constexpr bool is_bytes(Format format) { return format == INT8 || format == E4M3; }

static inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

static inline int64_t block_bytes(Format format, int64_t columns) {
  const int64_t groups = padded(columns) / GROUP;
  switch (format) {
    case F32: return groups * GROUP * LINE;
    case BF16:
    case F16: return groups * GROUP / 2 * LINE;
    case INT8:
    case E4M3: return (groups + 1) / 2 * LINE + groups * 8 * LINE;
    case INT4: return groups * 5 * LINE;
  }
  return 0;
}

struct Matrix {
  Format format;
  int64_t rows, columns;
  const uint8_t* blocks;  // aligned to a line

  int64_t pairs() const { return padded(rows) / PAIR; }
  int64_t groups() const { return padded(columns) / GROUP; }
  int64_t bytes() const { return 2 * pairs() * block_bytes(format, columns); }
  const uint8_t* block(int64_t b) const { return blocks + b * block_bytes(format, columns); }
};

// Products ask for lines this many bytes before they read them. Blocks begin too often for what CPUs do by themselves:
// with it 4-bit weights come up to 1.5 times as fast (Emerald Rapids; 4 KB to 16 KB are alike).
static constexpr int64_t AHEAD = 8192;
static ALWAYS_INLINE void fetch_ahead(const uint8_t* line) { __builtin_prefetch(line + AHEAD); }

// Where a group of a block begins: its 16 scales, and its lines. E4M3 is as INT8.
static ALWAYS_INLINE int64_t int8_scales(int64_t group) { return group / 2 * 17 * LINE + group % 2 * 32; }
static ALWAYS_INLINE int64_t int8_lines(int64_t group) { return group / 2 * 17 * LINE + LINE + group % 2 * 8 * LINE; }
static ALWAYS_INLINE int64_t int4_scales(int64_t group) { return group * 5 * LINE; }
static ALWAYS_INLINE int64_t int4_lows(int64_t group) { return group * 5 * LINE + 32; }
static ALWAYS_INLINE int64_t int4_lines(int64_t group) { return group * 5 * LINE + LINE; }
