// x W + (x A) B + b of bf16 with tiles (AMX), forward and backward of a linear map under a low-rank adapter.
#include "tile_products.h"

extern "C" int tile_products_available() {
#ifdef HAS_TILES
  return USE_TILES;
#else
  return 0;
#endif
}

#ifdef HAS_TILES

struct Product {
  Rows x;
  Right<bf16> weight;
  const float* bias;
  bf16* out;
  Update update;
  uint8_t* packed;
};

// What `multiply_block` asks for.
class Task {
 public:
  Task(const Product& product, Memory& memory, int64_t first, int64_t last)
      : product_(product),
        first_(first),
        size_(product.weight.steps() * STEP),
        thin_size_(product.update.steps() * STEP),
        packed_(memory.of((last - first) * (size_ + thin_size_ + static_cast<int64_t>(sizeof(Left))))),
        thins_(packed_ + (last - first) * size_),
        lefts_(reinterpret_cast<Left*>(thins_ + (last - first) * thin_size_)) {}
  int64_t panels() const { return product_.weight.panels(); }
  int64_t steps() const { return product_.weight.steps(); }
  Left left(int64_t s) const { return lefts_[s - first_]; }
  const uint8_t* right(int64_t p) const { return product_.packed + p * size_; }
  void prepare(int64_t s) const {
    const Left& left = lefts_[s - first_] = product_.x.left(s, packed_ + (s - first_) * size_);
    product_.update.multiply_first(left, s * STRIPE, product_.x.count(s), thin(s));
  }
  void complete(int64_t s, int64_t p, Sums& sums, int64_t) const {
    product_.update.add_second(thin(s), p);
    sums.store();
  }
  void finish(const float* sums, int64_t, int64_t s, int64_t p, int64_t r) const {
    const int64_t row = s * STRIPE + r, column = 32 * p, columns = product_.weight.columns;
    if (row >= product_.x.rows) return;
    __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
    const __mmask32 inside = static_cast<__mmask32>(first_bytes(columns - column));
    if (product_.bias) {
      const float* bias = product_.bias + column;
      low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), bias));
      high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside >> 16), bias + 16));
    }
    _mm512_mask_storeu_epi16(product_.out + row * columns + column, inside, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

 private:
  uint8_t* thin(int64_t s) const { return thins_ + (s - first_) * thin_size_; }
  const Product& product_;
  int64_t first_, size_, thin_size_;
  uint8_t *packed_, *thins_;
  Left* lefts_;
};

// out[rows, columns] = x[rows, inputs] W + thin B + bias, thin[rows, rank] = x A. The three right operands lie in memory
// with the numbers of a column (of_rows) or of a row side by side. `packed` has room for them as panels.
extern "C" void low_rank_product_bf16(const bf16* x, const bf16* w, const bf16* a, const bf16* b, const float* bias,
                                      bf16* out, bf16* thin, uint8_t* packed, int64_t rows, int64_t inputs,
                                      int64_t columns, int64_t rank, int64_t of_rows) {
  const bool side_by_side = of_rows != 0;
  packed += -reinterpret_cast<uintptr_t>(packed) % LINE;
  const Right<bf16> weight{w, inputs, columns, side_by_side};
  const Update update{{a, inputs, rank, side_by_side}, {b, rank, columns, side_by_side}, thin, packed + weight.bytes()};
  multiply_blocks<false, Task>(Product{{x, rows, inputs}, weight, bias, out, update, packed}, 0, [] {});
}

#else

extern "C" void low_rank_product_bf16(const bf16*, const bf16*, const bf16*, const bf16*, const float*, bf16*, bf16*,
                                      uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t) {}

#endif
