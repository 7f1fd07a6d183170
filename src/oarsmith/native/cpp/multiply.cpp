// Chooses how a matrix is multiplied: with sums in registers, or with tiles for few or for many rows.
#include "multiply.h"

#include "few_rows.h"
#include "many_rows.h"
#include "products.h"

namespace {

template <Format FORMAT>
void multiply_in_registers(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair,
                           int64_t last_pair, const Receiver& out) {
  const auto products = products_for<FORMAT>(inputs.height());
  alignas(64) float sums[MOST_ROWS_IN_REGISTERS * PAIR];
  const int64_t stripes = (rows + inputs.height() - 1) / inputs.height();
  const int64_t groups = matrix.groups() * (2 / blocks_at_once(FORMAT, static_cast<int>(inputs.height())));
  const int64_t each = 2 * block_bytes(FORMAT, matrix.columns) / LINE / (groups * stripes) + 1;
  for (int64_t pair = first_pair; pair < last_pair; ++pair) {
    const uint8_t* next = matrix.block(2 * (pair + 1));
    for (int64_t row = 0; row < rows; row += inputs.height(), next += each * groups * LINE) {
      products(matrix, inputs.stripe(row), pair, {next, stripes > 1 ? each : 0}, sums);
      out(pair, row, std::min(inputs.height(), rows - row), sums);
    }
  }
}

template <Format FORMAT>
void multiply_format(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair, int64_t last_pair,
                     const Receiver& out) {
#ifdef HAS_TILES
  if constexpr (FORMAT != F32 && FORMAT != F16)
    if (inputs.for_tiles()) {
      const Tiles tiles;
      if (rows <= 16) return multiply_few_rows<FORMAT, 1>(matrix, inputs, rows, first_pair, last_pair, out);
      if (rows <= FEW_ROWS) return multiply_few_rows<FORMAT, 2>(matrix, inputs, rows, first_pair, last_pair, out);
      return multiply_many_rows<FORMAT>(matrix, inputs, rows, first_pair, last_pair, out);
    }
#endif
  multiply_in_registers<FORMAT>(matrix, inputs, rows, first_pair, last_pair, out);
}

}  // namespace

void multiply_pairs(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair, int64_t last_pair,
                    const Receiver& out) {
  if (first_pair >= last_pair || rows == 0) return;
  switch (matrix.format) {
    case F32: return multiply_format<F32>(matrix, inputs, rows, first_pair, last_pair, out);
    case BF16: return multiply_format<BF16>(matrix, inputs, rows, first_pair, last_pair, out);
    case F16: return multiply_format<F16>(matrix, inputs, rows, first_pair, last_pair, out);
    case INT8: return multiply_format<INT8>(matrix, inputs, rows, first_pair, last_pair, out);
    case E4M3: return multiply_format<E4M3>(matrix, inputs, rows, first_pair, last_pair, out);
    case INT4: return multiply_format<INT4>(matrix, inputs, rows, first_pair, last_pair, out);
  }
}
