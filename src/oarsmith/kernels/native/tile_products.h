// Products of whole matrices with tiles (AMX): x[rows, inputs] W, and beside it the product with two thin matrices of a
// low-rank update, (x A) B, whose sums join those of x W before anything is rounded or stored.
//
// W is packed anew in each call: of a product with 2,048 rows that is some 5 % of the time, and no second copy of the
// weights stays in memory. Rows go by in blocks that fit a core's L2, columns in groups of panels: of a stripe's
// outputs, a group's lie side by side, for lines that lie in a page each are written slowly.
#pragma once
#include <cstdlib>
#include <memory>

#include "tile_operands.h"

#ifdef HAS_TILES

static const int64_t BLOCK_BYTES = 1 << 20;  // of a block of rows, half of an L2
static const int64_t GROUP_BYTES = 300 << 10;  // of a group of panels

// GCC does not tell itself that tiles are read from memory and written to it.
static inline void memory_changed() { __asm__ volatile("" ::: "memory"); }

static inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// 32 rows of 32 numbers of 32 bits, which the tiles 0 to 3 are.
struct alignas(64) Sums {
  float of[STRIPE][32];
  void load() const {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(of);
    _tile_loadd(0, from, 2 * LINE);
    _tile_loadd(1, from + LINE, 2 * LINE);
    _tile_loadd(2, from + STEP, 2 * LINE);
    _tile_loadd(3, from + STEP + LINE, 2 * LINE);
  }
  void store() {
    uint8_t* to = reinterpret_cast<uint8_t*>(of);
    _tile_stored(0, to, 2 * LINE);
    _tile_stored(1, to + LINE, 2 * LINE);
    _tile_stored(2, to + STEP, 2 * LINE);
    _tile_stored(3, to + STEP + LINE, 2 * LINE);
    memory_changed();
  }
};

// A stripe in memory: how far apart its rows and its steps are, in bytes.
struct Left {
  const uint8_t* data;
  int64_t row, step;
};

// Rows of bf16 as a stripe: where they lie, if tiles can be loaded from there, else packed. Packing costs a tenth of a
// product with 576 inputs and outputs.
struct Rows {
  const bf16* x;
  int64_t rows, inputs;
  int64_t count(int64_t stripe) const { return std::min(STRIPE, rows - stripe * STRIPE); }
  Left left(int64_t stripe, uint8_t* memory) const {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(x + stripe * STRIPE * inputs);
    if (2 * inputs % LINE == 0 && count(stripe) == STRIPE) return {from, 2 * inputs, LINE};
    pack_stripe(from, 2 * inputs, count(stripe), 2 * inputs, memory);
    memory_changed();
    return {memory, LINE, STEP};
  }
};

// Adds products of a stripe and a panel to the tiles 0 to 3: whole numbers of int8, fp32 of bf16. Twice in each step
// comes between(), other work that vectors do meanwhile.
template <bool WHOLE, class Between>
static inline __attribute__((always_inline)) void add_steps(const Left& left, int64_t from, int64_t until,
                                                            const uint8_t* panel, Between&& between) {
  const uint8_t *upper = left.data + from * left.step, *lower = upper + 16 * left.row, *right = panel + from * STEP;
  for (int64_t k = from; k < until; ++k, upper += left.step, lower += left.step, right += STEP) {
    _tile_loadd(4, upper, left.row);
    _tile_loadd(6, right, LINE);
    if constexpr (WHOLE) _tile_dpbssd(0, 4, 6);
    else _tile_dpbf16ps(0, 4, 6);
    between();
    _tile_loadd(7, right + TILE, LINE);
    if constexpr (WHOLE) _tile_dpbssd(1, 4, 7);
    else _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, left.row);
    if constexpr (WHOLE) _tile_dpbssd(2, 5, 6);
    else _tile_dpbf16ps(2, 5, 6);
    between();
    if constexpr (WHOLE) _tile_dpbssd(3, 5, 7);
    else _tile_dpbf16ps(3, 5, 7);
  }
}

// Memory of a thread that grows, aligned as lines are.
class Memory {
 public:
  uint8_t* of(int64_t bytes) {
    if (bytes > bytes_) {
      data_.reset(static_cast<uint8_t*>(std::aligned_alloc(4096, divided_up(bytes, 4096) * 4096)));
      bytes_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* data) const { std::free(data); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t bytes_ = 0;
};

// Columns of a right operand in memory: as rows (of bytes), or as columns.
template <class T>
struct Right {
  const T* data;
  int64_t inputs, columns;
  bool of_rows;
  int64_t steps() const { return divided_up(inputs * static_cast<int64_t>(sizeof(T)), LINE); }
  int64_t panels() const { return divided_up(columns, 32); }
  int64_t bytes() const { return panels() * steps() * STEP; }
  void pack(int64_t panel, uint8_t* packed) const {
    const int64_t some = columns - 32 * panel, bytes = inputs * static_cast<int64_t>(sizeof(T));
    uint8_t* out = packed + panel * steps() * STEP;
    if (of_rows)
      pack_panel_of_rows(reinterpret_cast<const uint8_t*>(data + 32 * panel * inputs), bytes, some, bytes, out);
    else
      pack_panel(data + 32 * panel, columns, inputs, some, out);
  }
};

// A low-rank update: of a stripe, x A rounded to bf16, as the second product's left operand and as rows of `thin`.
struct Update {
  Right<bf16> first, second;
  bf16* thin;
  uint8_t* packed;

  int64_t rank() const { return first.columns; }
  int64_t steps() const { return second.steps(); }
  // In a parallel region, whose barrier comes after it.
  void pack(int64_t panels) const {
    if (rank() == 0) return;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < first.panels(); ++p) first.pack(p, packed);
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels; ++p) second.pack(p, packed + first.bytes());
  }
  void multiply_first(const Left& left, int64_t row, int64_t rows, uint8_t* out) const {
    Sums sums;
    for (int64_t p = 0; p < first.panels(); ++p) {
      zero_tiles();
      add_steps<false>(left, 0, first.steps(), packed + p * first.steps() * STEP, [] {});
      sums.store();
      for (int64_t r = 0; r < STRIPE; ++r) {
        const __m512i both =
            (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums.of[r] + 16), _mm512_load_ps(sums.of[r]));
        _mm512_store_si512(out + p * STEP + r * LINE, both);
        if (r < rows)
          _mm512_mask_storeu_epi16(thin + (row + r) * rank() + 32 * p,
                                   static_cast<__mmask32>(first_bytes(rank() - 32 * p)), both);
      }
    }
    memory_changed();
  }
  void add_second(const uint8_t* left, int64_t panel) const {
    add_steps<false>({left, LINE, STEP}, 0, steps(), packed + first.bytes() + panel * steps() * STEP, [] {});
  }
};

// How rows are cut into blocks, evenly over the threads, and panels into groups.
struct Cut {
  int64_t stripes, blocks, group;
  Cut(int64_t rows, int64_t bytes_of_stripe, int64_t bytes_of_panel) {
    const int64_t threads = omp_get_max_threads(), most = std::max<int64_t>(1, BLOCK_BYTES / bytes_of_stripe);
    stripes = divided_up(rows, STRIPE);
    blocks = std::min(stripes, divided_up(divided_up(stripes, most), threads) * threads);
    group = std::min<int64_t>(16, std::max<int64_t>(1, GROUP_BYTES / bytes_of_panel));
  }
  int64_t first(int64_t block) const { return stripes * block / blocks; }
};

// Multiplies a block of stripes with all panels. A stripe is made by prepare(s), just before its first products, and is
// left(s) then; complete(s, panel, sums, number) may add to the tiles and stores them; finish(sums, number, s, panel,
// row) takes 32 sums of the ones before, while the next ones are made.
template <bool WHOLE, class Task>
static inline void multiply_block(const Task& task, int64_t first_stripe, int64_t last_stripe, int64_t group) {
  Sums sums[2];
  const int64_t panels = task.panels(), steps = task.steps(), most = std::min(steps, STRIPE / 2);
  int64_t number = 0, stripe_before = 0, panel_before = 0, row = STRIPE;
  const auto finish_row = [&] {
    task.finish(sums[(number + 1) % 2].of[row], number + 1, stripe_before, panel_before, row);
    ++row;
  };
  for (int64_t from = 0; from < panels; from += group)
    for (int64_t s = first_stripe; s < last_stripe; ++s) {
      if (from == 0) task.prepare(s);
      const Left left = task.left(s);
      for (int64_t p = from; p < std::min(panels, from + group); ++p, ++number) {
        zero_tiles();
        if (number > 0)
          add_steps<WHOLE>(left, 0, most, task.right(p), finish_row);
        else
          add_steps<WHOLE>(left, 0, most, task.right(p), [] {});
        add_steps<WHOLE>(left, most, steps, task.right(p), [] {});
        while (row < STRIPE) finish_row();
        task.complete(s, p, sums[number % 2], number);
        stripe_before = s, panel_before = p, row = 0;
      }
    }
  while (row < STRIPE) finish_row();
}

// Packs a product's right operands, and multiplies block by block. before() is called by all threads first; a stripe
// takes `wide` bytes beside its inputs. A Task is what multiply_block takes.
template <bool BYTES, class Task, class Product, class Before>
static void multiply_blocks(const Product& product, int64_t wide, const Before& before) {
  const int64_t panels = product.weight.panels(), size = product.weight.steps() * STEP;
  const Cut cut(product.x.rows, size + wide, size);
#pragma omp parallel
  {
    before();
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels; ++p) product.weight.pack(p, product.packed);
    product.update.pack(panels);
#pragma omp barrier
    static thread_local Memory memory;
    const Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < cut.blocks; ++b) {
      const int64_t first = cut.first(b), last = cut.first(b + 1);
      multiply_block<BYTES>(Task(product, memory, first, last), first, last, cut.group);
    }
  }
}

#endif
