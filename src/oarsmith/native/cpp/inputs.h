// Rows of activations, in the form and order in which the products of a format read them.
#pragma once
#include <algorithm>

#include "instructions.h"
#include "memory.h"

enum class Form {
  FLOATS,  // fp32
  HALVES,  // bf16
  BYTES,   // int8 in groups of 32 columns; a byte b stands for b * scale
};

// What belongs to a group of bytes.
struct GroupOfInputs {
  float scale;
  union {
    int32_t begin;  // for INT8, whose bytes are 128 too large: WHOLE's bits, less 128 times the sum of the bytes
    float sum;           // for INT4, whose weights lack their lows: the sum of the group's numbers
  };
};

// Rows are computed `height` at a time and lie in stripes of as many: for each group of columns the group of every row,
// behind which come, for BYTES, their `GroupOfInputs`. So a product finds all it reads at fixed distances.
class Inputs {
 public:
  // Makes room for rows to be multiplied by a matrix of this format and this many columns.
  void begin(Format format, int64_t columns, int64_t rows);
  // x[columns]. Threads may set different rows at once.
  void set_row(int64_t row, const float* x);

  Form form() const { return form_; }
  bool for_tiles() const { return for_tiles_; }
  int64_t height() const { return height_; }
  // The stripe in which a row is the first.
  const uint8_t* stripe(int64_t row) const { return rows_.data() + row / height_ * stripe_bytes_; }

 private:
  void set_group(uint8_t* stripe, int64_t row, int64_t group, const float* x);

  Format format_ = F32;
  Form form_ = Form::FLOATS;
  bool for_tiles_ = false;
  int64_t columns_ = 0, height_ = 1, stripe_bytes_ = 0, reserved_ = 0;
  Memory rows_;
};

// Bytes of a group of a row in a stripe, without what comes behind.
constexpr int64_t group_bytes(Form form) { return form == Form::FLOATS ? 128 : form == Form::HALVES ? 64 : 32; }
constexpr int64_t bytes_behind(Form form) { return form == Form::BYTES ? sizeof(GroupOfInputs) : 0; }

inline void Inputs::begin(Format format, int64_t columns, int64_t rows) {
  format_ = format;
  columns_ = columns;
  for_tiles_ = rows >= FEWEST_ROWS_FOR_TILES[format] && tiles_allowed();
  if (for_tiles_ || ((format == BF16 || format == E4M3) && DOTS_OF_HALVES))
    form_ = Form::HALVES;
  else
    form_ = (format == INT8 || format == INT4) && DOTS_OF_BYTES ? Form::BYTES : Form::FLOATS;
  height_ = for_tiles_ ? ROWS_OF_TILES : rows_in_registers(format, rows);
  const int64_t group = height_ * (group_bytes(form_) + bytes_behind(form_));
  stripe_bytes_ = (padded(columns) / GROUP * group + LINE - 1) / LINE * LINE;
  const int64_t needed = (rows + height_ - 1) / height_ * stripe_bytes_;
  if (needed > reserved_) {
    rows_ = Memory(needed);
    reserved_ = needed;
  }
}

inline void Inputs::set_row(int64_t row, const float* x) {
  uint8_t* stripe = rows_.data() + row / height_ * stripe_bytes_;
  const int64_t whole = columns_ / GROUP;
  for (int64_t g = 0; g < whole; ++g) set_group(stripe, row % height_, g, x + g * GROUP);
  if (whole * GROUP < columns_) {
    float rest[GROUP] = {};
    std::memcpy(rest, x + whole * GROUP, (columns_ - whole * GROUP) * sizeof(float));
    set_group(stripe, row % height_, whole, rest);
  }
}

ALWAYS_INLINE void Inputs::set_group(uint8_t* stripe, int64_t row, int64_t group, const float* x) {
  uint8_t* start = stripe + group * height_ * (group_bytes(form_) + bytes_behind(form_));
  uint8_t* mine = start + row * group_bytes(form_);
  const vec16 a = load16(x), b = load16(x + 16);
  if (form_ == Form::FLOATS) {
    store16(reinterpret_cast<float*>(mine), a);
    store16(reinterpret_cast<float*>(mine) + 16, b);
    return;
  }
  if (form_ == Form::HALVES) {
    to_bf16(a, reinterpret_cast<uint16_t*>(mine));
    to_bf16(b, reinterpret_cast<uint16_t*>(mine) + 16);
    return;
  }
  // 8 bits cannot hold what is not finite: it makes the group NaN. What is too small to divide by counts as zero.
  const float top = largest16(a, b);
  const bool finite = top < INFINITY;
  const float inverse = finite && top > 1e-35f ? 127.0f / top : 0.0f;
  const ivec16 whole_a = round16(finite ? a * inverse : zero16()), whole_b = round16(finite ? b * inverse : zero16());
  store_bytes16(mine, whole_a);
  store_bytes16(mine + 16, whole_b);
  const int32_t sum = sum16(whole_a + whole_b);
  GroupOfInputs about;
  about.scale = finite ? top / 127.0f : NAN;
  if (format_ == INT8)
    about.begin = WHOLE_BITS - 128 * sum;
  else
    about.sum = about.scale * static_cast<float>(sum);
  std::memcpy(start + height_ * 32 + row * sizeof(about), &about, sizeof(about));
}
