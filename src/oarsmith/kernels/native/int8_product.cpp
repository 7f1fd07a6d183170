// x W + (x A) B + b with W in 8 bits, with tiles (AMX): x is quantized row by row as it is read, and 32-bit sums become
// bf16 while the next ones are made. Forward, x is rotated before and W's scales are factors of the sums; backward they
// are factors of x (dy), and the output is rotated (kernels/int8.py).
#include <utility>
#include <vector>

#include "int8_rows.h"
#include "tile_products.h"

#ifdef HAS_TILES

struct Int8Product {
  Rows x;
  Right<int8_t> weight;
  const float *scale, *bias;
  int64_t block;  // of the rotation
  bool forward;
  bf16* out;
  Update update;
  uint8_t* packed;
};

// What `multiply_block` asks for.
class Int8Task {
 public:
  Int8Task(const Int8Product& product, Memory& memory, int64_t first, int64_t last) : product_(product), first_(first) {
    const int64_t stripes = last - first, inputs = product.weight.inputs, columns = product.weight.columns;
    size_ = product.weight.steps() * STEP, thin_size_ = product.update.steps() * STEP;
    const int64_t halves = product.update.rank() ? product.update.first.steps() * STEP : 0;
    const int64_t row = divided_up(inputs, LINE) * LINE, wide = product.forward ? 0 : stripes * STRIPE * columns * 4;
    uint8_t* at = memory.of(stripes * (size_ + thin_size_ + STRIPE * 4) + halves + 4 * row + wide + 2 * sizeof(Sums));
    const auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
    low_ = reinterpret_cast<Sums*>(take(2 * sizeof(Sums)));
    lefts_ = take(stripes * size_), thins_ = take(stripes * thin_size_), halves_ = take(halves);
    row_ = reinterpret_cast<float*>(take(4 * row));
    scales_ = reinterpret_cast<float*>(take(stripes * STRIPE * 4)), wide_ = reinterpret_cast<float*>(take(wide));
  }
  int64_t panels() const { return product_.weight.panels(); }
  int64_t steps() const { return product_.weight.steps(); }
  Left left(int64_t s) const { return {lefts_ + (s - first_) * size_, steps() * LINE, LINE}; }
  const uint8_t* right(int64_t p) const { return product_.packed + p * size_; }

  void prepare(int64_t s) const {
    const int64_t inputs = product_.weight.inputs, rows = product_.x.count(s), row = steps() * LINE;
    const float* columns = product_.forward ? nullptr : product_.scale;
    int8_t* values = reinterpret_cast<int8_t*>(lefts_ + (s - first_) * size_);
    float* scales = scales_ + (s - first_) * STRIPE;
    std::memset(values, 0, size_), std::memset(scales, 0, STRIPE * sizeof(float));
    for (int64_t r = 0; r < rows; ++r)
      scales[r] = quantize_row(product_.x.x + (s * STRIPE + r) * inputs, columns, values + r * row, row_, inputs,
                               product_.forward ? product_.block : 1);
    memory_changed();
    if (product_.update.rank() == 0) return;
    product_.update.multiply_first(product_.x.left(s, halves_), s * STRIPE, rows, thins_ + (s - first_) * thin_size_);
  }
  void complete(int64_t s, int64_t p, Sums& sums, int64_t number) const {
    sums.store();
    if (product_.update.rank() == 0) return;
    zero_tiles();
    product_.update.add_second(thins_ + (s - first_) * thin_size_, p);
    low_[number % 2].store();
  }
  void finish(const float* sums, int64_t number, int64_t s, int64_t p, int64_t r) const {
    const int64_t row = s * STRIPE + r, column = 32 * p, columns = product_.weight.columns;
    if (row >= product_.x.rows) return;
    const float scale = scales_[row - first_ * STRIPE] * (product_.forward ? 1.0f : rotation_norm(product_.block));
    const __mmask32 inside = static_cast<__mmask32>(first_bytes(columns - column));
    __m512 y[2];
    for (int h = 0; h < 2; ++h) {
      const __mmask16 some = static_cast<__mmask16>(inside >> 16 * h);
      const int64_t at = column + 16 * h;
      y[h] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * h)), _mm512_set1_ps(scale));
      if (product_.forward) y[h] = _mm512_mul_ps(y[h], _mm512_maskz_loadu_ps(some, product_.scale + at));
      if (product_.bias) y[h] = _mm512_add_ps(y[h], _mm512_maskz_loadu_ps(some, product_.bias + at));
      if (product_.update.rank()) y[h] = _mm512_add_ps(y[h], _mm512_load_ps(low_[number % 2].of[r] + 16 * h));
      if (!product_.forward) _mm512_mask_storeu_ps(wide_ + (row - first_ * STRIPE) * columns + at, some, y[h]);
    }
    if (product_.forward)
      _mm512_mask_storeu_epi16(product_.out + row * columns + column, inside, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
    else if (p + 1 == panels())
      rotate(wide_ + (row - first_ * STRIPE) * columns, product_.out + row * columns);
  }

 private:
  // The factor of the rotation is in `scale` and in the update's second matrix already.
  void rotate(float* wide, bf16* out) const {
    butterflies(wide, product_.weight.columns, product_.block);
#pragma omp simd
    for (int64_t i = 0; i < product_.weight.columns; ++i) store(out + i, wide[i]);
  }
  const Int8Product& product_;
  int64_t first_, size_, thin_size_;
  uint8_t *lefts_, *thins_, *halves_;
  float *row_, *scales_, *wide_;
  Sums* low_;
};

// Rows of bf16, rotated, each number with the factor 1 / block: one root of it for this rotation, one for the output's.
static void rotate_rows(const bf16* x, int64_t rows, int64_t dim, int64_t block, bf16* out) {
  const float factor = 1.0f / static_cast<float>(block);
#pragma omp for schedule(static) nowait
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> w(dim);
    for (int64_t i = 0; i < dim; ++i) w[i] = load(x + r * dim + i);
    butterflies(w.data(), dim, block);
    for (int64_t i = 0; i < dim; ++i) store(out + r * dim + i, w[i] * factor);
  }
}

// out[rows, columns], thin[rows, rank] as in low_rank_product.cpp; w in 8 bits with `scale`, of columns forward, of
// inputs backward. `packed` has room for three right operands and, backward, for b once more.
extern "C" void int8_product_bf16(const bf16* x, const int8_t* w, const float* scale, const bf16* a, const bf16* b,
                                  const float* bias, bf16* out, bf16* thin, uint8_t* packed, int64_t rows,
                                  int64_t inputs, int64_t columns, int64_t rank, int64_t block, int64_t forward) {
  const bool of_rows = forward != 0;
  packed += -reinterpret_cast<uintptr_t>(packed) % LINE;
  const Right<int8_t> weight{w, inputs, columns, of_rows};
  Update update{{a, inputs, rank, of_rows}, {b, rank, columns, of_rows}, thin, packed + weight.bytes()};
  bf16* rotated = reinterpret_cast<bf16*>(update.packed + (rank ? update.first.bytes() + update.second.bytes() : 0));
  if (!of_rows) update.second.data = rotated;
  const Int8Product product{{x, rows, inputs}, weight, scale, bias, block, of_rows, out, update, packed};
  multiply_blocks<true, Int8Task>(product, of_rows ? 0 : STRIPE * columns * 4, [&] {
    if (of_rows || rank == 0) return;
    rotate_rows(b, rank, columns, block, rotated);
#pragma omp barrier
  });
}

#else

extern "C" void int8_product_bf16(const bf16*, const int8_t*, const float*, const bf16*, const bf16*, const float*,
                                  bf16*, bf16*, uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) {}

#endif
