// Causal attention of whole documents in bf16, forward and backward, without leaving a core's cache.
// A task is some queries of a document against the keys they see, for the query heads that share a key head. Tasks
// write to places of their own and what several tasks find for a key is summed in order, so the result does not depend
// on the threads. Within a task everything goes in blocks of queries and keys with the softmax's sums carried along, so
// what is used again does not leave the cache however long the document is. Products run on bf16 pairs with fp32 sums;
// probabilities and score gradients are rounded to bf16 between two products, as in block attention.
#include "bf16_packs.h"
#include "bf16_rows.h"
#include "document_blocks.h"

extern "C" int document_attention_available() {
#ifdef HAS_BF16_PRODUCTS
  return 1;
#else
  return 0;
#endif
}

#ifdef HAS_BF16_PRODUCTS

static const float LOG2_E = 1.44269504088896341f;

// One thread's memory.
struct Scratch {
  Tiles tiles;
  Buffer<float> scores, grads, out, delta, sums;
  Buffer<bf16> query_rows, grad_rows, rounded;
  Buffer<uint32_t> keys, values, key_rows, p_pairs, ds_pairs, query_pairs, grad_pairs;
};

// What all tasks of a call share. o and d_out are contiguous.
struct Call {
  Shape s;
  View q, k, v, o, d_out;
  int64_t tokens;
  float* lse;  // [heads, tokens]
};

// Results of a query so far: its row of `out` and `sum` count 2^(score - top), with scores in base 2.
struct Running {
  float top, sum;
};

// A strip's scores to probabilities in bf16, but for the division by their sum.
static void soften(const Strip& strip, const Shape& s, float* scores, Running* run, float* out, bf16* p) {
  const float scale = s.scale * LOG2_E;
  for (int64_t r = 0; r < strip.rows; ++r) {
    strip.mask(s, r, scores + r * STRIDE, -INFINITY);
    float top = scale * largest_of(scores + r * STRIDE, strip.wide);
    if (!(top > run[r].top)) continue;
    float factor = power_of_two(run[r].top - top);
    run[r] = {top, run[r].sum * factor};
    multiply(out + r * s.value_dim, s.value_dim, factor);
  }
  for (int64_t r = 0; r < strip.rows; ++r) {
    // A row that sees none of these keys may have no top yet.
    float less = run[r].top == -INFINITY ? 0.0f : run[r].top;
    run[r].sum += powers_of_two(scores + r * STRIDE, strip.wide, scale, less, p + r * 2 * HALF);
  }
}

static void forward(const Task& t, const Call& c, bf16* o, Scratch& w) {
  const Shape& s = c.s;
  const int64_t depth = pad32(s.dim), vd = s.value_dim, value_row = vd + 16, queries = t.q1 - t.q0;
  const int64_t key_size = depth / 2 * STRIDE, value_size = KEYS / 2 * value_row;
  uint32_t *keys = w.keys.fit(t.blocks() * key_size), *values = w.values.fit(t.blocks() * value_size);
  bf16 *rows = w.query_rows.fit(ROWS * depth), *p = w.rounded.fit(STRIP * 2 * HALF);
  float *scores = w.scores.fit(STRIP * STRIDE), *out = w.out.fit(pad16(queries) * vd);
  for (int64_t b = t.block0, i = 0; b < t.block1; ++b, ++i) {
    int64_t at = t.start + b * KEYS, count = t.keys(b);
    pair_columns(c.k.at(at, t.group), c.k.token, count, s.dim, pad32(count), keys + i * key_size, STRIDE);
    pair_rows(c.v.at(at, t.group), c.v.token, count, vd, pad32(count), values + i * value_size, value_row);
  }
  for (int64_t head = t.group * s.share(); head < (t.group + 1) * s.share(); ++head) {
    std::vector<Running> running(queries, {-INFINITY, 0.0f});
    std::fill(out, out + pad16(queries) * vd, 0.0f);
    for_blocks(t, s, [&](int64_t q0, int64_t stop, int64_t first, int64_t last) {
      copy_rows(c.q.at(t.start + q0, head), c.q.token, stop - q0, s.dim, rows, depth);
      for (int64_t number = first; number < last; ++number)
        for (int64_t at = q0; at < stop; at += STRIP) {
          Strip strip(t, at, stop, number);
          if (!strip.wide) continue;
          const int64_t high = pad16(strip.rows), i = number - t.block0;
          float* sums = out + (at - t.q0) * vd;
          product(high, strip.wide, depth / 2, rows + (at - q0) * depth, depth / 2, keys + i * key_size, STRIDE, scores,
                  STRIDE, false);
          soften(strip, s, scores, &running[at - t.q0], sums, p);
          product(high, vd, strip.wide / 2, p, HALF, values + i * value_size, value_row, sums, vd, true);
        }
    });
    for (int64_t i = 0; i < queries; ++i) {
      int64_t token = t.start + t.q0 + i;
      c.lse[head * c.tokens + token] = running[i].top / LOG2_E + std::log(running[i].sum);
      round_row(out + i * vd, vd, 1.0f / running[i].sum, o + (token * s.heads + head) * vd);
    }
  }
}

// Probabilities and score gradients of a strip in bf16: in pairs of rows for the products over queries, and the score
// gradients also as they lie for the product over keys.
static void differentiate(const Strip& strip, const Shape& s, float* scores, float* grads, const float* lse,
                          const float* delta, uint32_t* p_pairs, uint32_t* ds_pairs, bf16* ds) {
  for (int64_t r = 0; r < pad32(strip.rows); r += 2) {
    TwoRows two;
    for (int64_t i = 0; i < 2; ++i) {
      float *x = scores + (r + i) * STRIDE, *dx = grads + (r + i) * STRIDE;
      strip.mask(s, r + i, x, -INFINITY);
      strip.mask(s, r + i, dx, 0.0f);
      bool there = r + i < strip.rows;
      two.x[i] = x, two.dx[i] = dx;
      two.lse[i] = there ? LOG2_E * lse[r + i] : 0.0f;
      two.delta[i] = there ? delta[r + i] : 0.0f;
    }
    differentiate(two, strip.wide, s.scale * LOG2_E, s.scale, p_pairs + r / 2 * STRIDE, ds_pairs + r / 2 * STRIDE,
                  ds + r * 2 * HALF, 2 * HALF);
  }
}

// c[columns, keys] += a[columns, queries] x[queries, keys] for the queries [q0, stop) and a block of keys from k0,
// `wide` of which are seen. x is zero where a query does not see a key, or unset where no query of its strip does.
static void over_queries(int64_t q0, int64_t stop, int64_t k0, int64_t wide, int64_t columns, const uint32_t* a,
                         const uint32_t* x, float* c) {
  const bool diagonal = k0 + wide > q0 + 1;
  const int64_t step = diagonal ? STRIP : wide, pairs = pad32(stop - q0) / 2;
  for (int64_t k = 0; k < wide; k += step) {
    int64_t p = std::max<int64_t>(k0 + k - q0, 0) / STRIP * STRIP / 2;  // earlier queries see none of these keys
    product(columns, std::min(step, wide - k), pairs - p, a + p, Q_HALF, x + p * STRIDE + k, STRIDE, c + k, STRIDE,
            true);
  }
}

// Over the keys, the sum of p * dp is that of output times its gradient.
__attribute__((noinline)) static float dot(const bf16* x, const bf16* y, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(x + i) * load(y + i);
  return sum;
}

// The keys and values of a task in the forms that its products take, block after block.
struct PackedKeys {
  int64_t depth, value_depth, row, key_size, value_size, row_size;
  uint32_t *keys, *values, *rows;
  PackedKeys(const Task& t, const Call& c, Scratch& w) : depth(pad32(c.s.dim)), value_depth(pad32(c.s.value_dim)) {
    row = c.s.dim + 16;  // not a power of two either
    key_size = depth / 2 * STRIDE, value_size = value_depth / 2 * STRIDE, row_size = KEYS / 2 * row;
    keys = w.keys.fit(t.blocks() * key_size);
    values = w.values.fit(t.blocks() * value_size);
    rows = w.key_rows.fit(t.blocks() * row_size);
    for (int64_t b = t.block0, i = 0; b < t.block1; ++b, ++i) {
      int64_t at = t.start + b * KEYS, count = t.keys(b), padded = pad32(count);
      const bf16 *key = c.k.at(at, t.group), *value = c.v.at(at, t.group);
      pair_columns(key, c.k.token, count, c.s.dim, padded, keys + i * key_size, STRIDE);
      pair_columns(value, c.v.token, count, c.s.value_dim, padded, values + i * value_size, STRIDE);
      pair_rows(key, c.k.token, count, c.s.dim, padded, rows + i * row_size, row);
    }
  }
};

// The backward pass of one head of a task: writes dq (contiguous) and adds the gradients of keys and values to `sums`.
static void backward_head(const Task& t, const Call& c, int64_t head, const PackedKeys& packed, bf16* dq, float* sums,
                          Scratch& w) {
  const Shape& s = c.s;
  const int64_t depth = packed.depth, value_depth = packed.value_depth, queries = t.q1 - t.q0;
  uint32_t *q_pairs = w.query_pairs.fit(s.dim * Q_HALF), *g_pairs = w.grad_pairs.fit(s.value_dim * Q_HALF);
  uint32_t *p_pairs = w.p_pairs.fit(ROWS / 2 * STRIDE), *ds_pairs = w.ds_pairs.fit(ROWS / 2 * STRIDE);
  bf16 *q_rows = w.query_rows.fit(ROWS * depth), *g_rows = w.grad_rows.fit(ROWS * value_depth);
  bf16* ds = w.rounded.fit(STRIP * 2 * HALF);
  float *scores = w.scores.fit(STRIP * STRIDE), *grads = w.grads.fit(STRIP * STRIDE);
  float *out = w.out.fit(pad16(queries) * s.dim), *delta = w.delta.fit(queries);
  std::fill(out, out + pad16(queries) * s.dim, 0.0f);
  for (int64_t i = 0, token = t.start + t.q0; i < queries; ++i, ++token)
    delta[i] = dot(c.o.at(token, head), c.d_out.at(token, head), s.value_dim);
  for_blocks(t, s, [&](int64_t q0, int64_t stop, int64_t first, int64_t last) {
    const bf16 *q = c.q.at(t.start + q0, head), *g = c.d_out.at(t.start + q0, head);
    copy_rows(q, c.q.token, stop - q0, s.dim, q_rows, depth);
    copy_rows(g, c.d_out.token, stop - q0, s.value_dim, g_rows, value_depth);
    pair_rows_transposed(q, c.q.token, stop - q0, s.dim, pad32(stop - q0), q_pairs, Q_HALF);
    pair_rows_transposed(g, c.d_out.token, stop - q0, s.value_dim, pad32(stop - q0), g_pairs, Q_HALF);
    for (int64_t number = first; number < last; ++number) {
      const int64_t i = number - t.block0;
      int64_t wide = 0;
      for (int64_t at = q0; at < stop; at += STRIP) {
        Strip strip(t, at, stop, number);
        if (!strip.wide) continue;
        const int64_t high = pad16(strip.rows), r = at - q0;
        product(high, strip.wide, depth / 2, q_rows + r * depth, depth / 2, packed.keys + i * packed.key_size, STRIDE,
                scores, STRIDE, false);
        product(high, strip.wide, value_depth / 2, g_rows + r * value_depth, value_depth / 2,
                packed.values + i * packed.value_size, STRIDE, grads, STRIDE, false);
        differentiate(strip, s, scores, grads, c.lse + head * c.tokens + t.start + at, delta + at - t.q0,
                      p_pairs + r / 2 * STRIDE, ds_pairs + r / 2 * STRIDE, ds);
        product(high, s.dim, strip.wide / 2, ds, HALF, packed.rows + i * packed.row_size, packed.row,
                out + (at - t.q0) * s.dim, s.dim, true);
        wide = strip.wide;  // the last strip sees most
      }
      float* dk = sums + i * s.sums_of_block();
      over_queries(q0, stop, number * KEYS, wide, s.dim, q_pairs, ds_pairs, dk);
      over_queries(q0, stop, number * KEYS, wide, s.value_dim, g_pairs, p_pairs, dk + s.dim * STRIDE);
    }
  });
  for (int64_t i = 0; i < queries; ++i)
    round_row(out + i * s.dim, s.dim, 1.0f, dq + ((t.start + t.q0 + i) * s.heads + head) * s.dim);
}

// `sums` gets the gradients of the task's keys and values from its queries: for each block dk transposed, then dv.
static void backward(const Task& t, const Call& c, bf16* dq, float* sums, Scratch& w) {
  std::fill(sums, sums + t.blocks() * c.s.sums_of_block(), 0.0f);
  PackedKeys packed(t, c, w);
  for (int64_t head = t.group * c.s.share(); head < (t.group + 1) * c.s.share(); ++head)
    backward_head(t, c, head, packed, dq, sums, w);
}

// The gradients of a block of keys and values, summed over the parts that their document is cut into.
static void write_keys(const Task* parts, int64_t count, int64_t block, const Shape& s, const float* all, bf16* dk,
                       bf16* dv, Buffer<float>& scratch) {
  const int64_t size = s.sums_of_block(), vd = s.value_dim;
  float* total = scratch.fit(size);
  std::fill(total, total + size, 0.0f);
  for (const Task* t = parts; t < parts + count; ++t)
    if (block >= t->block0 && block < t->block1) {
      const float* more = all + t->sums + (block - t->block0) * size;
      for (int64_t i = 0; i < size; ++i) total[i] += more[i];
    }
  int64_t place = (parts->start + block * KEYS) * s.groups + parts->group, keys = parts[count - 1].keys(block);
  round_transposed(total, STRIDE, s.dim, keys, dk + place * s.dim, s.groups * s.dim);
  round_transposed(total + s.dim * STRIDE, STRIDE, vd, keys, dv + place * vd, s.groups * vd);
}

// The same for all blocks of documents that are cut; the parts of a document lie one after another.
static void add_parts(const std::vector<Task>& tasks, const Shape& s, const float* all, bf16* dk, bf16* dv) {
  struct Job {
    const Task* parts;
    int64_t count, block;
  };
  std::vector<Job> jobs;
  for (size_t i = 0, next; i < tasks.size(); i = next) {
    for (next = i + 1; next < tasks.size() && tasks[next].q0 > 0;) ++next;
    for (int64_t b = 0; tasks[i].sums >= 0 && b < tasks[next - 1].block1; ++b)
      jobs.push_back({&tasks[i], static_cast<int64_t>(next - i), b});
  }
#pragma omp parallel
  {
    Buffer<float> scratch;
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < jobs.size(); ++i)
      write_keys(jobs[i].parts, jobs[i].count, jobs[i].block, s, all, dk, dv, scratch);
  }
}

template <class F> static void run(std::vector<Task> tasks, F each) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.area() > b.area(); });
#pragma omp parallel
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) each(tasks[i], scratch);
  }
}

// q[tokens, heads, dim], k[tokens, groups, dim], v[tokens, groups, value_dim]; bounds[documents + 1] from 0 to tokens;
// o[tokens, heads, value_dim], lse[heads, tokens].
extern "C" void document_attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse,
                                        const int64_t* bounds, int64_t documents, const int64_t* strides, int64_t heads,
                                        int64_t groups, int64_t dim, int64_t value_dim, int64_t window, float scale) {
  Call c{{heads, groups, dim, value_dim, window, scale}, {}, {}, {}, {}, {}, bounds[documents], lse};
  c.q = {q, strides[0], strides[1]}, c.k = {k, strides[2], strides[3]}, c.v = {v, strides[4], strides[5]};
  std::vector<Task> tasks;
  for (int64_t d = 0; d < documents; ++d)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t q0 = 0, length = bounds[d + 1] - bounds[d]; q0 < length; q0 += CHUNK)
        tasks.push_back(task_of(c.s, bounds[d], g, q0, std::min(q0 + CHUNK, length)));
  run(tasks, [&](const Task& t, Scratch& w) { forward(t, c, o, w); });
}

// o and d_out are contiguous; dq, dk, dv (contiguous) are written whole.
extern "C" void document_attention_backward_bf16(const bf16* q, const bf16* k, const bf16* v, const bf16* o,
                                                 const bf16* d_out, float* lse, bf16* dq, bf16* dk, bf16* dv,
                                                 const int64_t* bounds, int64_t documents, const int64_t* strides,
                                                 int64_t heads, int64_t groups, int64_t dim, int64_t value_dim,
                                                 int64_t window, float scale) {
  Call c{{heads, groups, dim, value_dim, window, scale}, {}, {}, {}, {}, {}, bounds[documents], lse};
  c.q = {q, strides[0], strides[1]}, c.k = {k, strides[2], strides[3]}, c.v = {v, strides[4], strides[5]};
  c.o = {o, heads * value_dim, value_dim}, c.d_out = {d_out, heads * value_dim, value_dim};
  int64_t size;
  std::vector<Task> tasks = cut(c.s, bounds, documents, &size);
  Buffer<float> parts;
  float* all = parts.fit(size);
  run(tasks, [&](Task t, Scratch& w) {
    if (t.sums >= 0) return backward(t, c, dq, all + t.sums, w);
    t.sums = 0;
    float* own = w.sums.fit(t.blocks() * c.s.sums_of_block());
    backward(t, c, dq, own, w);
    for (int64_t b = 0; b < t.block1; ++b) write_keys(&t, 1, b, c.s, own, dk, dv, w.scores);
  });
  add_parts(tasks, c.s, all, dk, dv);
}

#else

extern "C" void document_attention_bf16() {}
extern "C" void document_attention_backward_bf16() {}

#endif
