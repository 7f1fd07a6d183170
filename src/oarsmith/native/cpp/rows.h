// Rows of activations: buffers that hold one for every row of a step, norms, and what a step's rows are.
#pragma once
#include "memory.h"
#include "vec.h"

// [rows, stride] of fp32. The stride is a multiple of 32; what lies beyond the width is 0.
struct Buffer {
  float* data = nullptr;
  int64_t stride = 0;
  float* row(int64_t index) const { return data + index * stride; }
};

// The tokens of a step. Row i is `tokens[i]` at place `places[i]` of sequence `sequences[i]`; rows of a sequence are in
// order and lie side by side.
struct StepRows {
  int64_t count;
  const int32_t *tokens, *places, *sequences;
  const int32_t *positions, *blocks;  // what rotations and learned positions go by; null: places, 0
  const int32_t *lows, *highs;        // the first and the last place that a row sees; null: 0, its own
  const int32_t* const* pages;        // [sequences]: the pages of each
  const int32_t* slots;               // [sequences]: where the state of each is kept

  int32_t position(int64_t row, int64_t of_blocks = 0) const {
    if (of_blocks) return blocks == nullptr ? 0 : blocks[row];
    return positions == nullptr ? places[row] : positions[row];
  }
  StepRows part(int64_t first, int64_t size) const {
    const auto from = [first](const int32_t* x) { return x == nullptr ? nullptr : x + first; };
    return {size, from(tokens), from(places), from(sequences), from(positions), from(blocks), from(lows), from(highs),
            pages, slots};
  }
};

// RMS norm, or layer norm where it is centered; size 0: no norm. A size smaller than the row: one norm for each piece
// of that size, with weights of its own where `weights` says so. `count` of the numbers are no padding.
struct Norm {
  int64_t size, count;
  const float *weight, *bias;  // null: 1, 0
  float eps;
  int32_t centered;
  int64_t weights;  // how many pieces have weights of their own
};

static inline void apply_one(const Norm& norm, const float* weight, const float* bias, const float* x, float* y) {
  const int64_t size = norm.size, whole = size / 16 * 16;
  vec16 sums = zero16();
  float mean = 0.0f, square = 0.0f;
  if (norm.centered) {
    for (int64_t i = 0; i < whole; i += 16) sums += load16(x + i);
    for (int64_t i = whole; i < size; ++i) mean += x[i];
    mean = (mean + sum16(sums)) / size;
    sums = zero16();
  }
  for (int64_t i = 0; i < whole; i += 16) {
    const vec16 d = load16(x + i) - mean;
    sums = fma16(d, d, sums);
  }
  for (int64_t i = whole; i < size; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt((square + sum16(sums)) / norm.count + norm.eps);
  for (int64_t i = 0; i < whole; i += 16) {
    vec16 d = (load16(x + i) - mean) * factor;
    if (weight != nullptr) d *= load16(weight + i);
    if (bias != nullptr) d += load16(bias + i);
    store16(y + i, d);
  }
  for (int64_t i = whole; i < size; ++i) {
    const float d = (x[i] - mean) * factor;
    y[i] = d * (weight != nullptr ? weight[i] : 1.0f) + (bias != nullptr ? bias[i] : 0.0f);
  }
}

// The norm of x[width]; y may be x.
static inline void apply(const Norm& norm, int64_t width, const float* x, float* y) {
  for (int64_t piece = 0; piece * norm.size < width; ++piece) {
    const int64_t own = norm.weights > 1 ? piece * norm.size : 0;
    apply_one(norm, norm.weight == nullptr ? nullptr : norm.weight + own,
              norm.bias == nullptr ? nullptr : norm.bias + own, x + piece * norm.size, y + piece * norm.size);
  }
}
