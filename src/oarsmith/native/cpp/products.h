// The products of a few blocks with a few rows of inputs, all sums in registers.
#pragma once
#include "inputs.h"

static ALWAYS_INLINE ivec16 load_line(const uint8_t* line) { return load16(reinterpret_cast<const int32_t*>(line)); }
static ALWAYS_INLINE vec16 load_halves(const uint8_t* x) { return from_fp16(reinterpret_cast<const uint16_t*>(x)); }

// Column c of the few columns of a line, before it is scaled.
template <Format FORMAT>
static ALWAYS_INLINE vec16 column(const ivec16& line, int c) {
  if constexpr (FORMAT == F32)
    return bits16<float>(line);
  else if constexpr (FORMAT == BF16)
    return bits16<float>(by_part<ivec16>([c](auto u) { return c ? u & ~0xffff : u << 16; }, line));
  else if constexpr (FORMAT == E4M3)
    return from_e4m3<false>(by_part<ivec16>([c](auto u) { return (u >> (c % 2 * 16 + c / 2 * 8)) & 255; }, line));
  else if constexpr (FORMAT == INT8)
    return convert16<float>(by_part<ivec16>([c](auto u) { return ((u >> (8 * c)) & 255) - 128; }, line));
  else
    return convert16<float>(by_part<ivec16>([c](auto u) { return (u >> (8 * (c % 4) + c / 4 * 4)) & 15; }, line));
}

// Lines to bring into L2 meanwhile: where several stripes pass by a pair of blocks, each brings a part of the next.
struct Later {
  const uint8_t* lines;
  int64_t lines_a_group;
};

// R rows of a stripe of R, and B blocks.
template <Format FORMAT, int R, int B>
struct Registers {
  const uint8_t* blocks[B];
  const uint8_t* inputs;
  int64_t groups;
  vec16 sums[R][B];

  template <class T>
  static ALWAYS_INLINE T input(const uint8_t* x) {
    T out;
    std::memcpy(&out, x, sizeof(T));
    return out;
  }

  // fp32 inputs with weights of fp32, bf16 or fp16.
  ALWAYS_INLINE void add_floats(int64_t g) {
    constexpr int COLUMNS = FORMAT == F32 ? 1 : 2, LINES = 32 / COLUMNS;
    const uint8_t* x = inputs + g * R * 128;
#pragma GCC unroll 4
    for (int i = 0; i < LINES; ++i, x += 4 * COLUMNS) {
      ivec16 lines[B];
      for (int b = 0; b < B; ++b) lines[b] = load_line(blocks[b] + (g * LINES + i) * LINE);
#pragma GCC unroll 2
      for (int c = 0; c < COLUMNS; ++c) {
        vec16 weights[B];
        for (int b = 0; b < B; ++b)
          if constexpr (FORMAT == F16)
            weights[b] = load_halves(blocks[b] + (g * LINES + i) * LINE + 32 * c);
          else
            weights[b] = column<FORMAT>(lines[b], c);
        for (int r = 0; r < R; ++r) {
          const vec16 one = all16(input<float>(x + r * 128 + 4 * c));
          for (int b = 0; b < B; ++b) sums[r][b] = fma16(weights[b], one, sums[r][b]);
        }
      }
    }
  }

  // fp32 inputs with weights of 8 or 4 bits, where there are no products of bytes, or of halves.
  ALWAYS_INLINE void add_scaled_floats(int64_t g) {
    constexpr int COLUMNS = is_bytes(FORMAT) ? 4 : 8, LINES = 32 / COLUMNS;
    const uint8_t* x = inputs + g * R * 128;
    for (int b = 0; b < B; ++b) {
      const vec16 scale = scales(b, g), low = lows(b, g);
      for (int i = 0; i < LINES; ++i) {
        const ivec16 line = load_line(lines_of(b, g) + i * LINE);
        for (int c = 0; c < COLUMNS; ++c) {
          const vec16 weights = fma16(column<FORMAT>(line, c), scale, low);
          for (int r = 0; r < R; ++r)
            sums[r][b] = fma16(weights, input<float>(x + r * 128 + 4 * (i * COLUMNS + c)), sums[r][b]);
        }
      }
    }
  }

  ALWAYS_INLINE void add_halves(int64_t g) {
    const uint8_t* x = inputs + g * R * 64;
#pragma GCC unroll 4
    for (int i = 0; i < 16; ++i, x += 4) {
      ivec16 lines[B];
      for (int b = 0; b < B; ++b) lines[b] = load_line(blocks[b] + (g * 16 + i) * LINE);
      for (int r = 0; r < R; ++r) {
        const int32_t pair = input<int32_t>(x + r * 64);
        for (int b = 0; b < B; ++b) sums[r][b] = dot_halves(sums[r][b], lines[b], pair);
      }
    }
  }

  // bf16 inputs with weights of E4M3: these are bf16 too, before they are scaled.
  ALWAYS_INLINE void add_scaled_halves(int64_t g) {
    const uint8_t* x = inputs + g * R * 64;
    vec16 own[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) own[r][b] = zero16();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, x += 8) {
      ivec16 pairs[B][2];
      for (int b = 0; b < B; ++b) decoded(load_line(lines_of(b, g) + i * LINE), pairs[b]);
      for (int r = 0; r < R; ++r) {
        const int32_t first = input<int32_t>(x + r * 64), second = input<int32_t>(x + r * 64 + 4);
        for (int b = 0; b < B; ++b)
          own[r][b] = dot_halves(dot_halves(own[r][b], pairs[b][0], first), pairs[b][1], second);
      }
    }
    for (int b = 0; b < B; ++b) {
      const vec16 scale = scales(b, g);
      for (int r = 0; r < R; ++r) sums[r][b] = fma16(own[r][b], scale, sums[r][b]);
    }
  }

  ALWAYS_INLINE void add_bytes(int64_t g) {
    const uint8_t* x = inputs + g * R * (32 + sizeof(GroupOfInputs));
    GroupOfInputs about[R];
    for (int r = 0; r < R; ++r) about[r] = input<GroupOfInputs>(x + R * 32 + r * sizeof(GroupOfInputs));
    DotsOfBytes<FORMAT> dots[R][B];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) dots[r][b].begin(FORMAT == INT8 ? about[r].begin : WHOLE_BITS);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      ivec16 lines[B];
      for (int b = 0; b < B; ++b) lines[b] = bytes(lines_of(b, g), i);
      for (int r = 0; r < R; ++r) {
        const int32_t four = input<int32_t>(x + r * 32 + 4 * i);
        for (int b = 0; b < B; ++b) dots[r][b].add(lines[b], four);
      }
    }
    for (int b = 0; b < B; ++b) {
      const vec16 scale = scales(b, g), low = lows(b, g), excess = scale * -WHOLE;  // exact, and so is what is left
      for (int r = 0; r < R; ++r) {
        sums[r][b] = fma16(fma16(dots[r][b].total(), scale, excess), about[r].scale, sums[r][b]);
        if constexpr (FORMAT == INT4) sums[r][b] = fma16(low, about[r].sum, sums[r][b]);
      }
    }
  }

  ALWAYS_INLINE void fetch_group_ahead(int64_t g) const {
    constexpr int64_t LINES = FORMAT == F32 ? 32 : FORMAT == BF16 || FORMAT == F16 ? 16 : is_bytes(FORMAT) ? 8 : 5;
    for (int b = 0; b < B; ++b) {
      const uint8_t* first = is_bytes(FORMAT) ? lines_of(b, g) : blocks[b] + g * LINES * LINE;
#pragma GCC unroll 32
      for (int64_t i = 0; i < LINES; ++i) fetch_ahead(first + i * LINE);
      if (is_bytes(FORMAT)) fetch_ahead(blocks[b] + int8_scales(g));
    }
  }

  ALWAYS_INLINE void add_all(const Later& later) {
    const uint8_t* line = later.lines;
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) sums[r][b] = zero16();
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < later.lines_a_group; ++i, line += LINE) __builtin_prefetch(line, 0, 2);
      // Many rows of floats take so long that the CPU fetches enough by itself, and asking for it costs them 15 %.
      if constexpr (R <= 4 || is_scaled(FORMAT))
        if (later.lines_a_group == 0) fetch_group_ahead(g);
      if constexpr (FORMAT == BF16 && DOTS_OF_HALVES)
        add_halves(g);
      else if constexpr (FORMAT == F32 || FORMAT == BF16 || FORMAT == F16)
        add_floats(g);
      else if constexpr (FORMAT == E4M3 && DOTS_OF_HALVES)
        add_scaled_halves(g);
      else if constexpr (FORMAT != E4M3 && DOTS_OF_BYTES)
        add_bytes(g);
      else
        add_scaled_floats(g);
    }
  }

 private:
  ALWAYS_INLINE const uint8_t* lines_of(int b, int64_t g) const {
    return blocks[b] + (is_bytes(FORMAT) ? int8_lines(g) : int4_lines(g));
  }
  // The i-th four columns of the eight of a group.
  static ALWAYS_INLINE ivec16 bytes(const uint8_t* lines, int i) {
    if constexpr (FORMAT == INT8) return load_line(lines + i * LINE);
    const ivec16 both = load_line(lines + i / 2 * LINE);
    return by_part<ivec16>([i](auto x) { return (i % 2 ? x >> 4 : x) & 0x0f0f0f0f; }, both);
  }
  static ALWAYS_INLINE void decoded(const ivec16& line, ivec16* pairs) {
#ifdef HAS_AVX512
    __m512i found[2];
    pairs_of_e4m3((__m512i)line.parts[0], found);
    for (int half = 0; half < 2; ++half) pairs[half].parts[0] = (ivec16::Part)found[half];
#else
    (void)line, (void)pairs;  // never used: DOTS_OF_HALVES is false
#endif
  }
  ALWAYS_INLINE vec16 scales(int b, int64_t g) const {
    const vec16 kept = load_halves(blocks[b] + (is_bytes(FORMAT) ? int8_scales(g) : int4_scales(g)));
    return FORMAT == E4M3 ? kept * (1.0f / E4M3_SCALES) : kept;
  }
  ALWAYS_INLINE vec16 lows(int b, int64_t g) const {
    return FORMAT == INT4 ? load_halves(blocks[b] + int4_lows(g)) : zero16();
  }
};

// With few rows two blocks share what is read of the inputs; with many, sums of bytes (which are two, whole and scaled)
// have room for one block only.
constexpr int blocks_at_once(Format format, int rows) {
#ifdef HAS_AVX512
  return is_scaled(format) && rows > 4 ? 1 : 2;
#else
  (void)format;
  return rows == 1 ? 2 : 1;
#endif
}

// sums[R, 32] = the outputs of a pair of blocks for the rows of a stripe of R.
template <Format FORMAT, int R>
static void products(const Matrix& matrix, const uint8_t* stripe, int64_t pair, const Later& later, float* sums) {
  constexpr int B = blocks_at_once(FORMAT, R);
  for (int half = 0; half < 2; half += B) {
    Registers<FORMAT, R, B> registers;
    for (int b = 0; b < B; ++b) registers.blocks[b] = matrix.block(2 * pair + half + b);
    registers.inputs = stripe;
    registers.groups = matrix.groups();
    registers.add_all({later.lines + half / B * later.lines_a_group * matrix.groups() * LINE, later.lines_a_group});
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) store16(sums + r * PAIR + (half + b) * BLOCK, registers.sums[r][b]);
  }
}

// The products of stripes of this height.
template <Format FORMAT>
static auto products_for(int64_t height) {
  constexpr int MOST = most_rows_in_registers(FORMAT);
  switch (height) {
    case 1: return products<FORMAT, 1>;
    case 2: return products<FORMAT, 2>;
    case 3: return products<FORMAT, std::min(3, MOST)>;
    case 4: return products<FORMAT, std::min(4, MOST)>;
    case 6: return products<FORMAT, std::min(6, MOST)>;
    case 8: return products<FORMAT, std::min(8, MOST)>;
    case 10: return products<FORMAT, std::min(10, MOST)>;
    case 11: return products<FORMAT, std::min(11, MOST)>;
    default: return products<FORMAT, MOST>;
  }
}
