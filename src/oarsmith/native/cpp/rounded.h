// Keys and values of a kv head in a page, in 8 bits: groups of 32 entries of a position with an fp16 scale, as INT8
// weights have them. They become what attention reads (cache.h) when it reads them.
// Keys: for each 16 positions and group their scales, and behind all of these for each 16 positions and group 8 lines
// of 4 entries. Values: for each position the scales of its groups, and behind them for each 4 positions and 16 entries
// a line. So a line of keys is 4 entries of 16 positions, one of values 4 positions of 16 entries.
#pragma once
#include "pack.h"

enum class Stored : int32_t { F32 = 0, BF16 = 1 };

constexpr int64_t stored_bytes(Stored stored) { return stored == Stored::F32 ? 4 : 2; }

// Four columns in fp32, or as pairs in bf16, at out, out + stride, ...
template <Stored S>
static ALWAYS_INLINE void store_columns(const vec16* columns, uint8_t* out, int64_t stride) {
  if constexpr (S == Stored::F32) {
    for (int c = 0; c < 4; ++c) store16(reinterpret_cast<float*>(out + c * stride), columns[c]);
  } else {
    const auto half_up = [](const vec16& x) {
      return by_part<Sixteen<uint32_t>>([](auto u) { return u + 0x8000u; }, bits16<uint32_t>(x));
    };
    for (int c = 0; c < 4; c += 2)
      store16(reinterpret_cast<uint32_t*>(out + c / 2 * stride),
              by_part<Sixteen<uint32_t>>([](auto a, auto b) { return (a >> 16) | (b & 0xffff0000u); },
                                         half_up(columns[c]), half_up(columns[c + 1])));
  }
}

// The four columns of a line times their scales.
template <Stored S>
static ALWAYS_INLINE void unround_line(const uint8_t* line, const vec16* scales, int64_t scale_step, uint8_t* out,
                                       int64_t stride) {
  const ivec16 bytes = load16(reinterpret_cast<const int32_t*>(line));
  vec16 columns[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const ivec16 one = by_part<ivec16>([c](auto u) { return (u >> (8 * c)) & 255; }, bytes);
    const vec16 scale = scales[c * scale_step];
    columns[c] = fma16(convert16<float>(one), scale, scale * -128.0f);  // 128 is 0, exactly
  }
  store_columns<S>(columns, out, stride);
}

// 32 entries, with zeros behind the last.
static ALWAYS_INLINE const float* whole_group(const float* x, int64_t entries, float* room) {
  if (entries >= GROUP) return x;
  std::fill(room, room + GROUP, 0.0f);
  std::memcpy(room, x, entries * sizeof(float));
  return room;
}

struct RoundedKeys {
  RoundedKeys(uint8_t* start, int64_t dim, int64_t page_size)
      : scales_(start), lines_(start + page_size * groups(dim) * 2), dim_(dim) {}

  static int64_t groups(int64_t dim) { return padded(dim) / GROUP; }
  static int64_t bytes(int64_t dim, int64_t page_size) { return page_size * groups(dim) * (2 + GROUP); }

  void put(int64_t position, const float* key) const {
    float room[GROUP];
    for (int64_t g = 0; g < groups(dim_); ++g) {
      const int64_t at = position / 16 * groups(dim_) + g;
      pack_int8(whole_group(key + g * GROUP, dim_ - g * GROUP, room), static_cast<int>(position % 16),
                scales_ + at * 32, lines_ + at * 8 * LINE);
    }
  }

  // Of `count` positions from `first` on, a multiple of 16; whole sixteens.
  template <Stored S>
  void get(int64_t first, int64_t count, uint8_t* out) const {
    const int64_t column_bytes = 16 * stored_bytes(S);
    for (int64_t block = first / 16; block * 16 < first + count; ++block)
      for (int64_t g = 0; g < groups(dim_); ++g) {
        const int64_t at = block * groups(dim_) + g;
        const vec16 scale = from_fp16(reinterpret_cast<const uint16_t*>(scales_ + at * 32));
        const int64_t lines = std::min(GROUP, dim_ - g * GROUP) / 4;
        for (int64_t i = 0; i < lines; ++i, out += 4 * column_bytes)
          unround_line<S>(lines_ + (at * 8 + i) * LINE, &scale, 0, out, LINE);
      }
  }

 private:
  uint8_t *scales_, *lines_;
  int64_t dim_;
};

struct RoundedValues {
  RoundedValues(uint8_t* start, int64_t dim, int64_t page_size)
      : scales_(reinterpret_cast<uint16_t*>(start)), lines_(start + page_size * groups(dim) * 2), dim_(dim) {}

  static int64_t groups(int64_t dim) { return padded(dim) / GROUP; }
  static int64_t bytes(int64_t dim, int64_t page_size) { return page_size * (2 * groups(dim) + dim); }

  // `last`: the next position does not come in this step; it is read as zeros until it comes.
  void put(int64_t position, const float* value, bool last) const {
    float room[GROUP];
    uint8_t rounded[GROUP];
    const int64_t place = position % 4;
    uint16_t* scales = scales_ + position * groups(dim_);
    for (int64_t g = 0; g < groups(dim_); ++g) {
      const int64_t entries = std::min(GROUP, dim_ - g * GROUP);
      scales[g] = round_int8(whole_group(value + g * GROUP, entries, room), rounded);
      uint8_t* lines = line(position, 2 * g);
      for (int64_t i = 0; i < entries; ++i) lines[4 * i + place] = rounded[i];
    }
    if (last) std::memset(scales + groups(dim_), 0, (3 - place) * groups(dim_) * sizeof(uint16_t));
  }

  // Of `count` positions from `first` on, a multiple of 4; whole fours.
  template <Stored S>
  void get(int64_t first, int64_t count, uint8_t* out) const {
    const int64_t stride = 4 * dim_, step = stride * (S == Stored::F32 ? 4 : 2);
    for (int64_t position = first; position < first + count; position += 4, out += step)
      for (int64_t i = 0; i < dim_ / 16; ++i) {
        vec16 scales[4];
        for (int64_t c = 0; c < 4; ++c) scales[c] = all16(from_fp16(scales_[(position + c) * groups(dim_) + i / 2]));
        unround_line<S>(line(position, i), scales, 1, out + i * LINE, stride);
      }
  }

 private:
  uint8_t* line(int64_t position, int64_t i) const { return lines_ + (position / 4 * (dim_ / 16) + i) * LINE; }

  uint16_t* scales_;
  uint8_t* lines_;
  int64_t dim_;
};
