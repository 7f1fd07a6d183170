// What Python sees of matrices: their size, packing, rows, and the product alone, for tests and for measuring.
#include "multiply.h"
#include "pack_codes.h"

extern "C" {

int64_t native_block_bytes(int32_t format, int64_t columns) {
  return block_bytes(static_cast<Format>(format), columns);
}

// out has block_bytes for every 16 of the rows padded to 32, aligned to 64 bytes.
void native_pack(int32_t format, int32_t source_type, const void* source, const int64_t* row_index, int64_t rows,
                 int64_t columns, int64_t source_row_stride, uint8_t* out, int32_t threads) {
  const Source from{static_cast<Number>(source_type), source, row_index, rows, columns, source_row_stride};
  pack(static_cast<Format>(format), from, out, threads);
}

// Row r of the matrix is row row_index[r] of the codes, or one of zeros where that is -1; null: row r. See Codes.
void native_pack_codes(int32_t format, const uint8_t* codes, const float* scales, const float* lows,
                       const int64_t* row_index, int64_t rows, int64_t columns, int64_t group, uint8_t* out,
                       int32_t threads) {
  pack_codes(static_cast<Format>(format), {codes, scales, lows, row_index, rows, columns, group}, out, threads);
}

void native_unpack_row(int32_t format, const uint8_t* blocks, int64_t rows, int64_t columns, int64_t row, float* out) {
  unpack_row({static_cast<Format>(format), rows, columns, blocks}, row, out);
}

// y[count, rows] = x[count, columns] times the matrix transposed.
void native_multiply(int32_t format, const uint8_t* blocks, int64_t rows, int64_t columns, const float* x,
                     int64_t count, float* y, int32_t threads) {
  const Matrix matrix{static_cast<Format>(format), rows, columns, blocks};
  Inputs inputs;
  inputs.begin(matrix.format, columns, count);
  for (int64_t row = 0; row < count; ++row) inputs.set_row(row, x + row * columns);
  on_threads(threads, threads, [&](int64_t t) {
    const int64_t first = matrix.pairs() * t / threads, last = matrix.pairs() * (t + 1) / threads;
    multiply(matrix, inputs, count, first, last, [&](int64_t pair, int64_t row, const vec16& low, const vec16& high) {
      float both[PAIR];
      store16(both, low);
      store16(both + BLOCK, high);
      const int64_t wide = std::min(PAIR, rows - pair * PAIR);
      std::memcpy(y + row * rows + pair * PAIR, both, wide * sizeof(float));
    });
  });
}

// Zeros in pages of 2 MB, or null; what `native_release` gives back.
void* native_allocate(int64_t bytes, void** handle) {
  auto* memory = new Memory(static_cast<size_t>(bytes));
  *handle = memory;
  return memory->data();
}
void native_release(void* handle) { delete static_cast<Memory*>(handle); }
}
