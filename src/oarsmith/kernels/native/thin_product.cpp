// out = a^T x for a thin a, with tiles (AMX): the gradients of a low-rank adapter's two matrices, in one pass over x.
// With 2,048 rows and 16 to 48 columns of a, PyTorch's product took 1.1 to 1.5 times as long on a busy machine.
#include "tile_products.h"

#ifdef HAS_TILES

static const int64_t CHUNK_STEPS = 16;  // of rows, 512, that are packed and multiplied at a time
static const int64_t GROUP_PANELS = 4;  // of x: their parts of a row lie side by side

// a[rows, columns] as left operand with its columns as rows: the tiles of a right operand, transposed.
static void pack_transposed(const bf16* a, int64_t row, int64_t rows, int64_t columns, uint8_t* out) {
  pack_panel(a, row, rows, columns, out);
  for (int64_t tile = 0; tile < 2 * divided_up(rows, 32); ++tile, out += TILE) {
    __m512i block[16];
    for (int64_t j = 0; j < 16; ++j) block[j] = _mm512_load_si512(out + j * LINE);
    transpose(block);
    for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(out + j * LINE, block[j]);
  }
}

struct ThinProduct {
  const bf16 *a, *x;
  float* out;
  int64_t rows, rank, columns;
  uint8_t* lefts;

  int64_t steps() const { return divided_up(rows, 32); }
  int64_t stripes() const { return divided_up(rank, STRIPE); }
  void pack_left(int64_t stripe) const {
    pack_transposed(a + STRIPE * stripe, rank, rows, rank - STRIPE * stripe, lefts + stripe * steps() * STEP);
  }

  // The panels [from, until); `memory` has room for a chunk of them, and for the sums.
  void multiply(int64_t from, int64_t until, uint8_t* memory) const {
    Sums* sums = reinterpret_cast<Sums*>(memory);
    uint8_t* packed = memory + GROUP_PANELS * stripes() * sizeof(Sums);
    for (int64_t first = 0; first < steps(); first += CHUNK_STEPS) {
      const int64_t some = std::min(CHUNK_STEPS, steps() - first);
      for (int64_t k = 0; k < some; ++k)
        for (int64_t p = from; p < until; ++p) {
          const int64_t row = 32 * (first + k);
          pack_panel(x + row * columns + 32 * p, columns, std::min<int64_t>(32, rows - row), columns - 32 * p,
                     packed + ((p - from) * CHUNK_STEPS + k) * STEP);
        }
      memory_changed();
      for (int64_t p = from; p < until; ++p)
        for (int64_t s = 0; s < stripes(); ++s) {
          Sums& of = sums[(p - from) * stripes() + s];
          first > 0 ? of.load() : zero_tiles();
          add_steps<false>({lefts + (s * steps() + first) * STEP, LINE, STEP}, 0, some,
                           packed + (p - from) * CHUNK_STEPS * STEP, [] {});
          of.store();
        }
    }
    for (int64_t p = from; p < until; ++p)
      for (int64_t s = 0; s < stripes(); ++s)
        for (int64_t r = 0; r < std::min(STRIPE, rank - STRIPE * s); ++r)
          std::memcpy(out + (STRIPE * s + r) * columns + 32 * p, sums[(p - from) * stripes() + s].of[r],
                      sizeof(float) * std::min<int64_t>(32, columns - 32 * p));
  }
};

// out[rank, columns] = a[rows, rank]^T x[rows, columns]. `packed` has room for a as left operand.
extern "C" void thin_product_bf16(const bf16* a, const bf16* x, float* out, uint8_t* packed, int64_t rows, int64_t rank,
                                  int64_t columns) {
  packed += -reinterpret_cast<uintptr_t>(packed) % LINE;
  const ThinProduct product{a, x, out, rows, rank, columns, packed};
  const int64_t panels = divided_up(columns, 32), threads = omp_get_max_threads();
  const int64_t groups = std::min(panels, divided_up(divided_up(panels, GROUP_PANELS), threads) * threads);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t s = 0; s < product.stripes(); ++s) product.pack_left(s);
    static thread_local Memory memory;
    const int64_t sums = product.stripes() * static_cast<int64_t>(sizeof(Sums));
    uint8_t* own = memory.of(GROUP_PANELS * (sums + CHUNK_STEPS * STEP));
    const Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t g = 0; g < groups; ++g) product.multiply(panels * g / groups, panels * (g + 1) / groups, own);
  }
}

#else

extern "C" void thin_product_bf16(const bf16*, const bf16*, float*, uint8_t*, int64_t, int64_t, int64_t) {}

#endif
