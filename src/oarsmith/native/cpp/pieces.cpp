// Operations that few families need: products head by head, and a row joined to the one before it.
#include "step.h"

// Members divide the heads: each brings all rows of a head into its own inputs.
void Step::heads(const Operation& op, int64_t rows, int member) {
  const Buffer source = buffers_[op.source], target = buffers_[op.target];
  Inputs& inputs = inputs_for(op.matrices[0], true)[member];
  const Share share(op.count, member, team_.size());
  for (int64_t head = share.first; head < share.stop; ++head) {
    const Matrix& matrix = op.matrices[head];
    for (int64_t row = 0; row < rows; ++row) inputs.set_row(row, source.row(row) + head * op.source_step);
    multiply(matrix, inputs, rows, 0, matrix.pairs(), [&](int64_t pair, int64_t row, vec16 low, vec16 high) {
      float* y = target.row(row) + head * op.target_step + 32 * pair;
      // A step may be half of a pair.
      store16(y, low);
      if (32 * pair + 16 < op.target_step) store16(y + 16, high);
    });
  }
}

void Step::join(const Operation& op, int64_t rows, int member) {
  const Buffer source = buffers_[op.source], target = buffers_[op.target];
  const int64_t width = state_widths_[op.state];
  float* states = states_[op.state].data();
  const Share share(rows, member, team_.size());
  for (int64_t row = share.first; row < share.stop; ++row) {
    const int64_t sequence = rows_->sequences[row];
    float* y = target.row(row);
    if (row > 0 && rows_->sequences[row - 1] == sequence)
      std::memcpy(y, source.row(row - 1), 4 * width);
    else if (rows_->places[row] > 0)
      std::memcpy(y, states + rows_->slots[sequence] * width, 4 * width);
    else
      std::memset(y, 0, 4 * width);
    std::memcpy(y + width, source.row(row), 4 * width);
  }
  team_.meet();
  if (member != 0) return;
  for (int64_t row = 0; row < rows; ++row)
    if (row + 1 == rows || rows_->sequences[row + 1] != rows_->sequences[row])
      std::memcpy(states + rows_->slots[rows_->sequences[row]] * width, source.row(row), 4 * width);
}
