// Keys and values of a kv head in a page, in 8 bits with a scale that is known before: whole numbers from -127 to 127, 128
// added to each (0: not a number), or E4M3. They become what attention reads (cache.h) when it reads them.
// Keys: for each 16 positions a line for each 4 entries. Values: for each 4 positions a line for each 16 entries.
#pragma once
#include "rounded.h"

enum class Code { INT, E4M3 };

template <Code CODE>
struct Fixed {
  static constexpr uint8_t NOTHING = CODE == Code::INT ? 128 : 0;

  // 16 bytes of numbers that have been divided by the scale; what is not finite becomes NaN.
  static ALWAYS_INLINE void encode(const vec16& x, uint8_t* bytes) {
    const ivec16 finite = abs16(x) < all16(INFINITY);
    if constexpr (CODE == Code::E4M3) return store_bytes16(bytes, to_e4m3(where16(finite, x, all16(NAN))));
    const vec16 most = all16(127.0f), inside = min16(max16(where16(finite, x, zero16()), -most), most);
    store_bytes16(bytes, where16(finite, round16(inside) + 128, every16(0)));
  }

  // The numbers of bytes, one in each whole number.
  static ALWAYS_INLINE vec16 decode(const ivec16& bytes) {
    if constexpr (CODE == Code::E4M3) return from_e4m3<true>(bytes);
    return where16(bytes == every16(0), all16(NAN), convert16<float>(bytes - 128));
  }

  // The four columns of a line, as `store_columns` has them.
  template <Stored S>
  static ALWAYS_INLINE void decode_line(const uint8_t* line, const vec16& scale, uint8_t* out, int64_t stride) {
    const ivec16 bytes = load16(reinterpret_cast<const int32_t*>(line));
    vec16 columns[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      columns[c] = decode(by_part<ivec16>([c](auto u) { return (u >> (8 * c)) & 255; }, bytes)) * scale;
    store_columns<S>(columns, out, stride);
  }
};

template <Code CODE>
struct FixedKeys {
  uint8_t* lines;
  int64_t dim;
  float scale;

  void put(int64_t position, const float* key) const {
    uint8_t* block = lines + position / 16 * 16 * dim + position % 16 * 4;
    for (int64_t i = 0; i < dim; i += 16) {
      uint8_t bytes[16];
      Fixed<CODE>::encode(load16(key + i) / scale, bytes);
      for (int64_t j = 0; j < 16; j += 4) std::memcpy(block + (i + j) / 4 * LINE, bytes + j, 4);
    }
  }

  // Of `count` positions from `first` on, a multiple of 16; whole sixteens.
  template <Stored S>
  void get(int64_t first, int64_t count, uint8_t* out) const {
    const vec16 scales = all16(scale);
    const int64_t step = 4 * 16 * stored_bytes(S);
    for (int64_t position = first; position < first + count; position += 16)
      for (int64_t i = 0; i < dim / 4; ++i, out += step)
        Fixed<CODE>::template decode_line<S>(lines + position * dim + i * LINE, scales, out, LINE);
  }
};

template <Code CODE>
struct FixedValues {
  uint8_t* lines;
  int64_t dim;
  float scale;

  // `last`: the next position does not come in this step; it is read as zeros until it comes.
  void put(int64_t position, const float* value, bool last) const {
    const int64_t place = position % 4;
    for (int64_t i = 0; i < dim; i += 16) {
      uint8_t bytes[16], *line = lines + position / 4 * 4 * dim + 4 * i;
      Fixed<CODE>::encode(load16(value + i) / scale, bytes);
      for (int64_t j = 0; j < 16; ++j) {
        line[4 * j + place] = bytes[j];
        if (last) std::memset(line + 4 * j + place + 1, Fixed<CODE>::NOTHING, 3 - place);
      }
    }
  }

  // Of `count` positions from `first` on, a multiple of 4; whole fours.
  template <Stored S>
  void get(int64_t first, int64_t count, uint8_t* out) const {
    const vec16 scales = all16(scale);
    const int64_t stride = 4 * dim, step = stride * (S == Stored::F32 ? 4 : 2);
    for (int64_t position = first; position < first + count; position += 4, out += step)
      for (int64_t i = 0; i < dim / 16; ++i)
        Fixed<CODE>::template decode_line<S>(lines + position * dim + i * LINE, scales, out + i * LINE, stride);
  }
};
