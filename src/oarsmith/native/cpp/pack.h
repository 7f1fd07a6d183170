// Weights as checkpoints have them, rows of fp32, bf16 or fp16, to blocks (matrix.h) and back.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>

#include "e4m3.h"
#include "matrix.h"

enum Number : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

struct Source {
  Number type;
  const void* rows;
  const int64_t* index;  // packed row r is row index[r], or one of zeros where that is -1; null: packed row r is row r
  int64_t num_rows, columns, stride;  // stride in numbers

  // Row r in fp32.
  void read(int64_t r, float* out) const {
    const int64_t row = r >= num_rows ? -1 : index ? index[r] : r;
    if (row < 0) return std::fill(out, out + columns, 0.0f);
    const uint16_t* halves = static_cast<const uint16_t*>(rows) + row * stride;
    int64_t c = 0;
    if (type == FLOAT32) {
      std::memcpy(out, static_cast<const float*>(rows) + row * stride, columns * 4);
    } else if (type == BFLOAT16) {
      for (; c < columns; ++c) out[c] = from_bf16(halves[c]);
    } else {
      for (; c + 16 <= columns; c += 16) store16(out + c, from_fp16(halves + c));
      for (; c < columns; ++c) out[c] = from_fp16(halves[c]);
    }
  }
};

// A group's bytes, of which 128 is 0; returns the fp16 scale. What is not finite makes that NaN, and so the output.
static inline uint16_t round_int8(const float* w, uint8_t* bytes) {
  const vec16 a = load16(w), b = load16(w + 16);
  const float top = largest16(a, b);
  const bool finite = top < INFINITY;
  const uint16_t half = to_fp16(finite ? top / 127.0f : NAN);
  const float scale = from_fp16(half), inverse = scale > 0 ? 1.0f / scale : 0.0f;
  const auto whole = [&](const vec16& x) {
    return round16(min16(max16(x * inverse, all16(-127.0f)), all16(127.0f))) + 128;
  };
  store_bytes16(bytes, whole(a));
  store_bytes16(bytes + 16, whole(b));
  return half;
}

// A group's numbers as row r of its lines.
static inline void place_int8(const uint8_t* bytes, int r, uint8_t* lines) {
  for (int i = 0; i < 8; ++i) std::memcpy(lines + i * LINE + 4 * r, bytes + 4 * i, 4);
}
static inline void place_int4(const uint8_t* bytes, int r, uint8_t* lines) {
  for (int i = 0; i < 4; ++i) {
    uint32_t four[2];
    std::memcpy(four, bytes + 8 * i, 8);
    four[0] |= four[1] << 4;
    std::memcpy(lines + i * LINE + 4 * r, four, 4);
  }
}
static inline void place_e4m3(const uint8_t* bytes, int r, uint8_t* lines) {
  for (int i = 0; i < 8; ++i, bytes += 4) {
    const uint8_t four[4] = {bytes[0], bytes[2], bytes[1], bytes[3]};
    std::memcpy(lines + i * LINE + 4 * r, four, 4);
  }
}

// Writes row r of a group.
static inline void pack_int8(const float* w, int r, uint8_t* scales, uint8_t* lines) {
  uint8_t bytes[GROUP];
  const uint16_t half = round_int8(w, bytes);
  std::memcpy(scales + 2 * r, &half, 2);
  place_int8(bytes, r, lines);
}

static inline void pack_e4m3(const float* w, int r, uint8_t* scales, uint8_t* lines) {
  const vec16 a = load16(w), b = load16(w + 16);
  const float top = largest16(a, b);
  const uint16_t half = to_fp16(top < INFINITY ? top / E4M3_MOST * E4M3_SCALES : NAN);
  const float scale = from_fp16(half) / E4M3_SCALES, inverse = scale > 0 ? 1.0f / scale : 0.0f;
  uint8_t bytes[GROUP];
  store_bytes16(bytes, to_e4m3(a * inverse));
  store_bytes16(bytes + 16, to_e4m3(b * inverse));
  std::memcpy(scales + 2 * r, &half, 2);
  place_e4m3(bytes, r, lines);
}

// How many steps lie between the ends of a group such that all numbers are whole steps: so it is with weights that had 4
// bits before, fewer than 15 where they did not use them all, such as GGUF's Q4_0. 0: they are no such numbers.
static inline int steps_between(const vec16& a, const vec16& b, float low, float other) {
  for (int steps = 15; steps >= 8; --steps) {
    const float inverse = static_cast<float>(steps) / (other - low);
    const auto off = [&](const vec16& x) {
      const vec16 number = (x - low) * inverse;
      return number - convert16<float>(round16(number));
    };
    if (largest16(off(a), off(b)) < 0.05f) return steps;  // bf16 has lost a little of a weight
  }
  return 0;
}

// A group's fp16 scale and low. Weights that had 4 bits before are kept as they are. Others get a low that is a multiple
// of the scale, so that zero is one of the numbers: near-zero weights of inputs that are always large stay near zero.
struct Int4Range {
  uint16_t scale, low;
};

static inline Int4Range int4_range(const vec16& a, const vec16& b) {
  const float top = max_of16(max16(a, b)), bottom = -max_of16(max16(-a, -b));
  if (!(largest16(a, b) < INFINITY)) return {to_fp16(NAN), to_fp16(bottom)};
  // Where fp16 holds only the upper end, steps go down from there: the scale is negative.
  const auto exact = [](float x) { return from_fp16(to_fp16(x)) == x; };
  const bool down = exact(top) && !exact(bottom);
  const uint16_t end = to_fp16(down ? top : bottom);
  const float low = from_fp16(end), range = down ? bottom - top : std::max(0.0f, top - low);
  const int steps = range == 0 ? 15 : steps_between(a, b, low, low + range);
  if (steps != 0) return {to_fp16(range / static_cast<float>(steps)), end};
  const uint16_t half = to_fp16((top - bottom) / 15.0f);
  const float scale = from_fp16(half);
  if (bottom >= 0 || top <= 0 || scale == 0) return {to_fp16((top - from_fp16(to_fp16(bottom))) / 15.0f), to_fp16(bottom)};
  return {half, to_fp16(std::nearbyint(bottom / scale) * scale)};
}

static inline void pack_int4(const float* w, int r, uint8_t* scales, uint8_t* lows, uint8_t* lines) {
  const vec16 a = load16(w), b = load16(w + 16);
  const Int4Range range = int4_range(a, b);
  const float low = from_fp16(range.low), scale = from_fp16(range.scale);
  const float inverse = std::abs(scale) > 0 ? 1.0f / scale : 0.0f;
  const auto whole = [&](const vec16& x) {
    return round16(min16(max16((x - low) * inverse, zero16()), all16(15.0f)));
  };
  uint8_t bytes[GROUP];
  store_bytes16(bytes, whole(a));
  store_bytes16(bytes + 16, whole(b));
  std::memcpy(scales + 2 * r, &range.scale, 2);
  std::memcpy(lows + 2 * r, &range.low, 2);
  place_int4(bytes, r, lines);
}

// Row r of a block, from its `wide` numbers with padding.
static inline void pack_row(Format format, const float* w, int64_t wide, int r, uint8_t* block) {
  if (format == F32) {
    for (int64_t c = 0; c < wide; ++c) std::memcpy(block + c * LINE + 4 * r, w + c, 4);
  } else if (format == BF16) {
    for (int64_t c = 0; c < wide; c += 16) {
      uint16_t halves[16];
      to_bf16(load16(w + c), halves);
      for (int64_t p = 0; p < 8; ++p) std::memcpy(block + (c / 2 + p) * LINE + 4 * r, halves + 2 * p, 4);
    }
  } else if (format == F16) {
    for (int64_t c = 0; c < wide; c += 16) {
      uint16_t halves[16];
      to_fp16(load16(w + c), halves);
      for (int64_t i = 0; i < 16; ++i) std::memcpy(block + (c + i) * 32 + 2 * r, halves + i, 2);
    }
  } else {
    for (int64_t g = 0; g < wide / GROUP; ++g) {
      if (format == INT8)
        pack_int8(w + g * GROUP, r, block + int8_scales(g), block + int8_lines(g));
      else if (format == E4M3)
        pack_e4m3(w + g * GROUP, r, block + int8_scales(g), block + int8_lines(g));
      else
        pack_int4(w + g * GROUP, r, block + int4_scales(g), block + int4_lows(g), block + int4_lines(g));
    }
  }
}

// Calls each(item) for 0 <= item < count, on this many threads.
template <class Each>
static void on_threads(int threads, int64_t count, Each&& each) {
  auto share = [&](int t) {
    for (int64_t i = count * t / threads; i < count * (t + 1) / threads; ++i) each(i);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(share, t);
  share(0);
  for (auto& other : others) other.join();
}

static inline void pack(Format format, const Source& source, uint8_t* out, int threads) {
  const int64_t size = block_bytes(format, source.columns);
  on_threads(threads, padded(source.num_rows) / BLOCK, [&](int64_t b) {
    thread_local std::vector<float> row;
    const int64_t columns = source.columns, wide = padded(columns);
    row.resize(wide);
    uint8_t* block = out + b * size;
    std::memset(block, 0, size);
    for (int r = 0; r < BLOCK; ++r) {
      source.read(b * BLOCK + r, row.data());
      // What meets inputs of zero only must not widen the range of the others.
      std::fill(row.data() + columns, row.data() + wide, format == INT4 ? row[columns - 1] : 0.0f);
      pack_row(format, row.data(), wide, r, block);
    }
  });
}

// out[columns]: what row `row` of the matrix stands for.
static inline void unpack_row(const Matrix& matrix, int64_t row, float* out) {
  const uint8_t* block = matrix.block(row / BLOCK);
  const int r = static_cast<int>(row % BLOCK);
  auto half = [r](const uint8_t* x) {
    uint16_t bits;
    std::memcpy(&bits, x + 2 * r, 2);
    return from_fp16(bits);
  };
  for (int64_t c = 0; c < matrix.columns; ++c) {
    const int64_t g = c / GROUP, in = c % GROUP;
    if (matrix.format == F32) {
      std::memcpy(out + c, block + c * LINE + 4 * r, 4);
    } else if (matrix.format == BF16) {
      uint16_t bits;
      std::memcpy(&bits, block + c / 2 * LINE + 4 * r + c % 2 * 2, 2);
      out[c] = from_bf16(bits);
    } else if (matrix.format == F16) {
      out[c] = half(block + c * 32);
    } else if (matrix.format == INT8) {
      const int q = block[int8_lines(g) + in / 4 * LINE + 4 * r + in % 4] - 128;
      out[c] = static_cast<float>(q) * half(block + int8_scales(g));
    } else if (matrix.format == E4M3) {
      static constexpr int PLACES[4] = {0, 2, 1, 3};
      const uint8_t code = block[int8_lines(g) + in / 4 * LINE + 4 * r + PLACES[in % 4]];
      out[c] = from_e4m3(code) * (half(block + int8_scales(g)) / E4M3_SCALES);
    } else {
      const int q = block[int4_lines(g) + in / 8 * LINE + 4 * r + in % 4] >> (in / 4 % 2 * 4) & 15;
      out[c] = static_cast<float>(q) * half(block + int4_scales(g)) + half(block + int4_lows(g));
    }
  }
}
