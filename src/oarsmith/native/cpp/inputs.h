// Rows of activations, in the form in which the products of a format read them.
#pragma once
#include <algorithm>
#include <cassert>

#include "matrix.h"
#include "memory.h"

class Inputs {
 public:
  // Makes room for rows to be multiplied by a matrix of this format and this many columns.
  void begin(Format format, int64_t columns, int64_t rows);
  // x[columns]. Threads may set different rows at once.
  void set_row(int64_t row, const float* x);

  int64_t columns() const { return columns_; }  // padded
  const float* floats(int64_t row) const { return reinterpret_cast<const float*>(rows_.data() + row * row_bytes_); }

 private:
  Memory rows_;
  int64_t reserved_ = 0, given_ = 0, columns_ = 0, row_bytes_ = 0;
};

inline void Inputs::begin(Format, int64_t columns, int64_t rows) {
  given_ = columns;
  columns_ = padded(columns);
  row_bytes_ = columns_ * 4 + LINE;
  const int64_t needed = (rows + 31) / 32 * 32 * row_bytes_;
  if (needed > reserved_) {
    rows_ = Memory(needed);
    reserved_ = needed;
  }
}

inline void Inputs::set_row(int64_t row, const float* x) {
  float* out = reinterpret_cast<float*>(rows_.data() + row * row_bytes_);
  std::memcpy(out, x, given_ * 4);
  std::memset(out + given_, 0, (columns_ - given_) * 4);
}
