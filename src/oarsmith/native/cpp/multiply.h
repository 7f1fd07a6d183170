// Products of activations with the rows of a matrix: y[row, output] = sum over c of x[row, c] W[output, c].
#pragma once
#include "inputs.h"
#include "products.h"

// Calls out(pair, row, low, high) with the outputs 32 * pair .. 32 * pair + 31 of every row, for the pairs of blocks
// [first_pair, last_pair). This is one thread's share; threads divide the pairs. The inputs' `begin` had the matrix's
// format and columns, and their first `rows` rows are set.
template <class Out>
static void multiply(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair, int64_t last_pair,
                     Out&& out) {
  vec16 sums[TILE_ROWS][2];
  for (int64_t pair = first_pair; pair < last_pair; ++pair)
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
      const int64_t count = std::min<int64_t>(TILE_ROWS, rows - row);
      products(matrix, inputs, pair, row, count, sums);
      for (int64_t r = 0; r < count; ++r) out(pair, row + r, sums[r][0], sums[r][1]);
    }
}
