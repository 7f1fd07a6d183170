// Products of activations with the rows of a matrix: y[row, output] = sum over c of x[row, c] W[output, c].
#pragma once
#include "inputs.h"

// Takes sums[count, 32]: the outputs of a pair of blocks for some rows.
struct Receiver {
  void* object;
  void (*take)(void* object, int64_t pair, int64_t row, int64_t count, const float* sums);
  void operator()(int64_t pair, int64_t row, int64_t count, const float* sums) const {
    take(object, pair, row, count, sums);
  }
};

void multiply_pairs(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair, int64_t last_pair,
                    const Receiver& out);

// Calls out(pair, row, low, high) with the outputs 32 * pair .. 32 * pair + 31 of every row, for the pairs of blocks
// [first_pair, last_pair). This is one thread's share; threads divide the pairs. The inputs' `begin` had the matrix's
// format and columns, and their first `rows` rows are set.
template <class Out>
static void multiply(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair, int64_t last_pair,
                     Out&& out) {
  const auto take = [](void* object, int64_t pair, int64_t row, int64_t count, const float* sums) {
    auto& to = *static_cast<std::remove_reference_t<Out>*>(object);
    for (int64_t r = 0; r < count; ++r) to(pair, row + r, load16(sums + r * PAIR), load16(sums + r * PAIR + BLOCK));
  };
  void* object = const_cast<void*>(static_cast<const void*>(&out));
  multiply_pairs(matrix, inputs, rows, first_pair, last_pair, {object, take});
}
