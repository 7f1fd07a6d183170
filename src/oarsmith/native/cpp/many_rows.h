// Several stripes of rows with tiles. A tile comes from L2 in 20 cycles, about as long as a product takes. So the
// weights are to stay in L1 while all rows pass by, and for that the columns are cut into chunks, after each of which
// the sums wait in memory. Where the inputs are larger than L2, a chunk of several pairs of blocks is multiplied before
// the next.
#pragma once
#include "tiles.h"

#ifdef HAS_TILES

static constexpr int64_t MOST_GROUPS = 9;         // of columns in a chunk: 18 KB of weights
static constexpr int64_t MOST_ROWS = 512;         // at a time
static constexpr int64_t MOST_PAIRS = 8;          // of blocks of which a chunk is multiplied before the next chunk
static constexpr int64_t LARGE_INPUTS = 1 << 20;  // bytes, half of an L2

// A piece of the work: a chunk of a pair of blocks.
struct Piece {
  int64_t pair, slot, first, groups;  // slot: of the pair among those whose sums wait
};

// All pieces of some pairs, by number.
class Pieces {
 public:
  Pieces(const Matrix& matrix, int64_t first_pair, int64_t last_pair, int64_t together)
      : first_(first_pair), pairs_(last_pair - first_pair), groups_(matrix.groups()), together_(together) {
    chunks_ = (groups_ + MOST_GROUPS - 1) / MOST_GROUPS;
  }
  int64_t count() const { return pairs_ * chunks_; }
  Piece operator[](int64_t number) const {
    const int64_t before = number / (together_ * chunks_) * together_, pairs = std::min(together_, pairs_ - before);
    const int64_t place = number - before * chunks_, chunk = place / pairs, slot = place % pairs;
    const int64_t first = groups_ * chunk / chunks_;
    return {first_ + before + slot, slot, first, groups_ * (chunk + 1) / chunks_ - first};
  }

 private:
  int64_t first_, pairs_, groups_, together_, chunks_;
};

// What a thread works in: the weights that are multiplied now and next, and sums.
struct TileMemory {
  Memory memory{4 * MOST_GROUPS * TILE_BYTES + MOST_PAIRS * MOST_ROWS * PAIR * sizeof(float)};
  uint8_t* weights(int64_t number) const { return memory.data() + number % 2 * 2 * MOST_GROUPS * TILE_BYTES; }
  float* sums(int64_t slot) const {
    return reinterpret_cast<float*>(weights(0) + 4 * MOST_GROUPS * TILE_BYTES) + slot * MOST_ROWS * PAIR;
  }
};

// Prepares a piece while the one before it is multiplied, an eighth of a group at a time, evenly over that one's steps.
template <Format FORMAT>
class PiecePreparation {
 public:
  PiecePreparation(const Matrix& matrix, const Piece& piece, uint8_t* weights, int64_t steps)
      : left_(matrix.block(2 * piece.pair)),
        right_(matrix.block(2 * piece.pair + 1)),
        weights_(weights),
        first_(piece.first),
        eighths_(8 * piece.groups),
        steps_(steps) {}
  ALWAYS_INLINE void step() {
    for (due_ += eighths_; due_ >= steps_ && done_ < eighths_; due_ -= steps_) eighth();
  }
  void rest() {
    while (done_ < eighths_) eighth();
  }

 private:
  ALWAYS_INLINE void eighth() {
    const int64_t g = done_ / 8;
    if (done_ % 8 == 0) preparation_.begin(left_, right_, first_ + g, weights_ + 2 * g * TILE_BYTES);
    preparation_.eighth(static_cast<int>(done_++ % 8));
  }
  Preparation<FORMAT, true> preparation_;
  const uint8_t *left_, *right_;
  uint8_t* weights_;
  int64_t first_, eighths_, steps_, due_ = 0, done_ = 0;
};

// At most MOST_ROWS rows, from a stripe's first on.
template <Format FORMAT>
static void multiply_stripes(const Matrix& matrix, const Inputs& inputs, int64_t first_row, int64_t rows,
                             const Pieces& pieces, const TileMemory& memory, const Receiver& out) {
  const int64_t stripes = (rows + ROWS_OF_TILES - 1) / ROWS_OF_TILES;
  alignas(64) float outputs[ROWS_OF_TILES * PAIR];
  Piece piece = pieces[0];
  PiecePreparation<FORMAT>(matrix, piece, memory.weights(0), 1).rest();
  for (int64_t number = 0; number < pieces.count(); ++number) {
    const bool last = number + 1 == pieces.count();
    const Piece next = last ? Piece{piece.pair, 0, 0, 0} : pieces[number + 1];
    PiecePreparation<FORMAT> preparation(matrix, next, memory.weights(number + 1), stripes * piece.groups * 4);
    const uint8_t* weights = memory.weights(number);
    const auto stripe = [&]<int T>(int64_t row, const float* before, float* after) {
      piece.first > 0 ? load_sums<T>(before) : zero_sums<T>();
      const uint8_t* x = inputs.stripe(first_row + row) + 2 * piece.first * TILE_BYTES;
      for (int64_t g = 0; g < piece.groups; ++g) {
        const uint8_t *left = weights + 2 * g * TILE_BYTES, *right = left + TILE_BYTES;
        if constexpr (FORMAT == BF16) {
          left = matrix.block(2 * piece.pair) + (piece.first + g) * TILE_BYTES;
          right = matrix.block(2 * piece.pair + 1) + (piece.first + g) * TILE_BYTES;
        }
        add_products<T>(x + 2 * g * TILE_BYTES, left, right, [&](int) { preparation.step(); });
      }
      store_sums<T>(after);
      memory_changed();
    };
    for (int64_t row = 0; row < rows; row += ROWS_OF_TILES) {
      float* sums = memory.sums(piece.slot) + row * PAIR;
      const bool complete = piece.first + piece.groups == matrix.groups();
      memory_changed();
      if (rows - row > 16)
        stripe.template operator()<2>(row, sums, complete ? outputs : sums);
      else
        stripe.template operator()<1>(row, sums, complete ? outputs : sums);
      if (complete) out(piece.pair, first_row + row, std::min(ROWS_OF_TILES, rows - row), outputs);
    }
    preparation.rest();
    piece = next;
  }
}

template <Format FORMAT>
static void multiply_many_rows(const Matrix& matrix, const Inputs& inputs, int64_t rows, int64_t first_pair,
                               int64_t last_pair, const Receiver& out) {
  thread_local TileMemory memory;
  const bool large = std::min(rows, MOST_ROWS) * matrix.groups() * group_bytes(Form::HALVES) > LARGE_INPUTS;
  const Pieces pieces(matrix, first_pair, last_pair, large ? MOST_PAIRS : 1);
  for (int64_t row = 0; row < rows; row += MOST_ROWS)
    multiply_stripes<FORMAT>(matrix, inputs, row, std::min(MOST_ROWS, rows - row), pieces, memory, out);
}

#endif
