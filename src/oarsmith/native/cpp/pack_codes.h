// Weights that are codes already, as quantized checkpoints have them, to blocks of the same numbers.
#pragma once
#include "pack.h"

struct Codes {
  const uint8_t* codes;        // rows of bytes. INT8: number + 128; INT4: 0 to 15; E4M3: as they are
  const float *scales, *lows;  // rows of a number for each group; lows: of INT4
  const int64_t* index;        // as Source has it
  int64_t num_rows, columns, group;  // group: columns that share a scale, a multiple of 32 unless all of them do

  int64_t groups() const { return (columns + group - 1) / group; }
};

// Row `row` of the codes as row r of a block; -1: zeros.
static inline void pack_codes_row(Format format, const Codes& from, int64_t row, int r, uint8_t* block) {
  const uint8_t nothing = format == INT8 ? 128 : 0;
  for (int64_t g = 0; g < padded(from.columns) / GROUP; ++g) {
    uint8_t bytes[GROUP];
    std::memset(bytes, nothing, GROUP);
    uint16_t scale = 0, low = 0;
    if (row >= 0) {
      std::memcpy(bytes, from.codes + row * from.columns + g * GROUP, std::min(GROUP, from.columns - g * GROUP));
      const int64_t at = row * from.groups() + g * GROUP / from.group;
      scale = to_fp16(format == E4M3 ? from.scales[at] * E4M3_SCALES : from.scales[at]);
      if (format == INT4) low = to_fp16(from.lows[at]);
    }
    if (format == INT4) {
      std::memcpy(block + int4_scales(g) + 2 * r, &scale, 2);
      std::memcpy(block + int4_lows(g) + 2 * r, &low, 2);
      place_int4(bytes, r, block + int4_lines(g));
    } else {
      std::memcpy(block + int8_scales(g) + 2 * r, &scale, 2);
      format == INT8 ? place_int8(bytes, r, block + int8_lines(g)) : place_e4m3(bytes, r, block + int8_lines(g));
    }
  }
}

static inline void pack_codes(Format format, const Codes& from, uint8_t* out, int threads) {
  const int64_t size = block_bytes(format, from.columns);
  on_threads(threads, padded(from.num_rows) / BLOCK, [&](int64_t b) {
    uint8_t* block = out + b * size;
    std::memset(block, 0, size);
    for (int r = 0; r < BLOCK; ++r) {
      const int64_t row = b * BLOCK + r;
      pack_codes_row(format, from, row >= from.num_rows ? -1 : from.index ? from.index[row] : row, r, block);
    }
  });
}
