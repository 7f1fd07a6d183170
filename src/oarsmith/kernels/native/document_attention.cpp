// Causal attention of whole documents in bf16, forward and backward, without leaving a core's cache.
// A task is some queries of a document against its keys, for the query heads that share a key head; tasks write to places
// of their own, so the result does not depend on which thread takes which. Products run on bf16 pairs with fp32 sums;
// probabilities and score gradients are rounded to bf16 between two products, as in block attention.
#include <vector>

#include "bf16_products.h"

extern "C" int document_attention_available() {
#ifdef HAS_BF16_PRODUCTS
  return 1;
#else
  return 0;
#endif
}

#ifdef HAS_BF16_PRODUCTS

static const int64_t ROWS = 48;    // queries of a block: 8 tiles of 6
static const int64_t KEYS = 256;   // keys of a block in the backward pass: its scores stay in the cache
static const int64_t CHUNK = 512;  // queries or keys of a task where a long document is cut
static const int64_t ENOUGH = 8;   // tasks that keep the threads busy without cutting documents

struct Shape {
  int64_t heads, groups, dim, value_dim, window;
  float scale;
};

// A tensor [tokens, heads, dim] with a contiguous last dimension.
struct View {
  const bf16* data;
  int64_t token, head;
  const bf16* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// Queries [q0, q1) and keys [k0, k1) of the document that begins at `start`, counted from there.
struct Task {
  int64_t start, group, q0, q1, k0, k1;
  bool queries, keys;  // backward: whose gradients
};

static int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }
static void fit(std::vector<float>& v, int64_t n) { if (static_cast<int64_t>(v.size()) < n) v.resize(n); }
static void fit(std::vector<uint32_t>& v, int64_t n) { if (static_cast<int64_t>(v.size()) < n) v.resize(n); }

// Keys that query i sees, as [from, to) of the keys that begin at k0.
static void seen(const Shape& s, int64_t i, int64_t k0, int64_t count, int64_t* from, int64_t* to) {
  int64_t low = s.window > 0 ? std::max<int64_t>(i - s.window + 1, 0) : 0;
  *from = std::min(std::max<int64_t>(low - k0, 0), count);
  *to = std::min(std::max<int64_t>(i + 1 - k0, 0), count);
}

struct Scratch {
  std::vector<float> scores, grads, out, dk, dv, delta;
  std::vector<uint32_t> keys, key_rows, values, p, p_pairs, ds_pairs, query_rows, grad_rows;
};

// exp(scale * x - top) as bf16, top the largest scale * x, zeros outside [from, to); returns their sum. A function of its
// own, or GCC does not vectorise the loops inside a parallel region. With the sum and the 16-bit store in one loop, GCC 12
// adds some terms twice.
__attribute__((noinline)) static float exponentials(float* x, int64_t from, int64_t to, int64_t wide, float scale,
                                                    bf16* out, float* largest) {
  float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
  for (int64_t j = from; j < to; ++j) top = std::max(top, x[j]);
  top *= scale;
#pragma omp simd
  for (int64_t j = from; j < to; ++j) x[j] = fast_exp(x[j] * scale - top);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = from; j < to; ++j) sum += x[j];
  for (int64_t j = 0; j < from; ++j) out[j].bits = 0;
#pragma omp simd
  for (int64_t j = from; j < to; ++j) store(out + j, x[j]);
  for (int64_t j = to; j < wide; ++j) out[j].bits = 0;
  *largest = top;
  return sum;
}

static void forward(const Task& t, const Shape& s, View q, View k, View v, bf16* o, float* lse, int64_t tokens,
                    Scratch& w) {
  int64_t share = s.heads / s.groups;
  int64_t first = s.window > 0 ? std::max<int64_t>(t.q0 - s.window + 1, 0) : 0, count = t.q1 - first;
  int64_t padded = pad16(count), vd = s.value_dim;
  fit(w.keys, s.dim / 2 * padded);
  fit(w.values, padded / 2 * vd);
  fit(w.scores, ROWS * padded);
  fit(w.p, ROWS * padded / 2);
  fit(w.out, ROWS * vd);
  pair_columns(k.at(t.start + first, t.group), k.token, count, s.dim, w.keys.data(), padded);
  std::fill(w.values.begin(), w.values.begin() + padded / 2 * vd, 0u);
  pair_rows(v.at(t.start + first, t.group), v.token, count, vd, w.values.data(), vd);
  bf16* p = reinterpret_cast<bf16*>(w.p.data());
  for (int64_t head = t.group * share; head < (t.group + 1) * share; ++head)
    for (int64_t q0 = t.q0; q0 < t.q1; q0 += ROWS) {
      int64_t rows = std::min(ROWS, t.q1 - q0), wide = pad16(q0 + rows - first);
      const bf16* queries = q.at(t.start + q0, head);
      product(rows, wide, s.dim / 2, reinterpret_cast<const Pair*>(queries), q.token / 2, 1, w.keys.data(), padded,
              w.scores.data(), padded, false);
      float sums[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        int64_t from, to;
        seen(s, q0 + r, first, count, &from, &to);
        float top;
        float sum = exponentials(w.scores.data() + r * padded, from, to, wide, s.scale, p + r * padded, &top);
        sums[r] = 1.0f / sum;
        lse[head * tokens + t.start + q0 + r] = top + std::log(sum);
      }
      product(rows, vd, wide / 2, w.p.data(), padded / 2, 1, w.values.data(), vd, w.out.data(), vd, false);
      for (int64_t r = 0; r < rows; ++r) {
        bf16* y = o + ((t.start + q0 + r) * s.heads + head) * vd;
        const float* x = w.out.data() + r * vd;
#pragma omp simd
        for (int64_t i = 0; i < vd; ++i) store(y + i, x[i] * sums[r]);
      }
    }
}

// Queries [q0, q0 + rows) against keys [k0, k0 + keys), both counted from the document's first token; `wide` keys are
// computed, a multiple of 16.
struct Block {
  int64_t q0, rows, k0, keys, wide;
};

// Probabilities and score gradients of a block from its scores and their gradients: in pairs of rows (of queries) for the
// products over queries, and the score gradients also as they lie for the product over keys.
__attribute__((noinline)) static void differentiate(const Block& b, const Shape& s, bool pairs, const float* lse, const float* delta, Scratch& w) {
  bf16* ds_rows = reinterpret_cast<bf16*>(w.p.data());
  for (int64_t r = 0; r < b.rows; ++r) {
    float *x = w.scores.data() + r * KEYS, *dx = w.grads.data() + r * KEYS;
    bf16* out = ds_rows + r * KEYS;
    int64_t from, to;
    seen(s, b.q0 + r, b.k0, b.keys, &from, &to);
    float l = lse[r], d = delta[r];
    for (int64_t j = 0; j < from; ++j) x[j] = dx[j] = 0.0f;
#pragma omp simd
    for (int64_t j = from; j < to; ++j) {
      float p = fast_exp(x[j] * s.scale - l);
      x[j] = p;
      dx[j] = s.scale * p * (dx[j] - d);
    }
    for (int64_t j = to; j < b.wide; ++j) x[j] = dx[j] = 0.0f;
#pragma omp simd
    for (int64_t j = 0; j < b.wide; ++j) store(out + j, dx[j]);
  }
  if (!pairs) return;
  for (int64_t r = 0; r < b.rows; r += 2) {
    const float *x = w.scores.data() + r * KEYS, *dx = w.grads.data() + r * KEYS;
    bool two = r + 1 < b.rows;
    uint32_t *p = w.p_pairs.data() + r / 2 * KEYS, *ds = w.ds_pairs.data() + r / 2 * KEYS;
    pair_rounded(x, two ? x + KEYS : nullptr, b.wide, p);
    pair_rounded(dx, two ? dx + KEYS : nullptr, b.wide, ds);
  }
}

static void write(const float* x, int64_t row, int64_t rows, int64_t dim, bf16* out, int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) store(out + r * out_row + i, x[r * row + i]);
}

static void backward(const Task& t, const Shape& s, View q, View k, View v, View o, View d_out, const float* lse,
                     bf16* dq, bf16* dk, bf16* dv, int64_t tokens, Scratch& w) {
  int64_t share = s.heads / s.groups, count = t.k1 - t.k0, padded = pad16(count), vd = s.value_dim;
  fit(w.keys, s.dim / 2 * padded);
  fit(w.values, vd / 2 * padded);
  fit(w.key_rows, padded / 2 * s.dim);
  for (std::vector<float>* each : {&w.scores, &w.grads}) fit(*each, ROWS * KEYS);
  for (std::vector<uint32_t>* each : {&w.p, &w.p_pairs, &w.ds_pairs}) fit(*each, ROWS / 2 * KEYS);
  fit(w.query_rows, ROWS / 2 * s.dim);
  fit(w.grad_rows, ROWS / 2 * vd);
  fit(w.delta, t.q1 - t.q0);
  pair_columns(k.at(t.start + t.k0, t.group), k.token, count, s.dim, w.keys.data(), padded);
  pair_columns(v.at(t.start + t.k0, t.group), v.token, count, vd, w.values.data(), padded);
  if (t.queries) {
    std::fill(w.key_rows.begin(), w.key_rows.begin() + padded / 2 * s.dim, 0u);
    pair_rows(k.at(t.start + t.k0, t.group), k.token, count, s.dim, w.key_rows.data(), s.dim);
  }
  if (t.keys) {
    w.dk.assign(padded * s.dim, 0.0f);
    w.dv.assign(padded * vd, 0.0f);
  }
  for (int64_t head = t.group * share; head < (t.group + 1) * share; ++head) {
    if (t.queries) w.out.assign((t.q1 - t.q0) * s.dim, 0.0f);
    // Over the keys, the sum of p * dp is that of output times its gradient.
    for (int64_t i = t.q0; i < t.q1; ++i) {
      const bf16 *x = o.at(t.start + i, head), *dx = d_out.at(t.start + i, head);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < vd; ++j) sum += load(x + j) * load(dx + j);
      w.delta[i - t.q0] = sum;
    }
    for (int64_t k0 = t.k0; k0 < t.k1; k0 += KEYS) {
      int64_t at = k0 - t.k0, here = std::min(KEYS, padded - at);
      int64_t skipped = std::max<int64_t>(k0 - t.q0, 0) / ROWS * ROWS;
      int64_t last = s.window > 0 ? std::min(t.q1, k0 + here + s.window) : t.q1;
      for (int64_t q0 = t.q0 + skipped; q0 < last; q0 += ROWS) {
        int64_t rows = std::min(ROWS, t.q1 - q0), wide = std::min(here, pad16(q0 + rows - k0));
        const bf16 *queries = q.at(t.start + q0, head), *grads = d_out.at(t.start + q0, head);
        product(rows, wide, s.dim / 2, reinterpret_cast<const Pair*>(queries), q.token / 2, 1, w.keys.data() + at,
                padded, w.scores.data(), KEYS, false);
        product(rows, wide, vd / 2, reinterpret_cast<const Pair*>(grads), d_out.token / 2, 1, w.values.data() + at,
                padded, w.grads.data(), KEYS, false);
        Block block{q0, rows, k0, std::min(KEYS, t.k1 - k0), wide};
        differentiate(block, s, t.keys, lse + head * tokens + t.start + q0, w.delta.data() + (q0 - t.q0), w);
        if (t.queries)
          product(rows, s.dim, wide / 2, w.p.data(), KEYS / 2, 1, w.key_rows.data() + at / 2 * s.dim, s.dim,
                  w.out.data() + (q0 - t.q0) * s.dim, s.dim, true);
        if (!t.keys) continue;
        int64_t pairs = (rows + 1) / 2;
        pair_rows(queries, q.token, rows, s.dim, w.query_rows.data(), s.dim);
        pair_rows(grads, d_out.token, rows, vd, w.grad_rows.data(), vd);
        product(wide, s.dim, pairs, w.ds_pairs.data(), 1, KEYS, w.query_rows.data(), s.dim,
                w.dk.data() + at * s.dim, s.dim, true);
        product(wide, vd, pairs, w.p_pairs.data(), 1, KEYS, w.grad_rows.data(), vd, w.dv.data() + at * vd, vd, true);
      }
    }
    if (t.queries)
      write(w.out.data(), s.dim, t.q1 - t.q0, s.dim, dq + ((t.start + t.q0) * s.heads + head) * s.dim, s.heads * s.dim);
  }
  if (!t.keys) return;
  int64_t place = (t.start + t.k0) * s.groups + t.group;
  write(w.dk.data(), s.dim, count, s.dim, dk + place * s.dim, s.groups * s.dim);
  write(w.dv.data(), vd, count, vd, dv + place * vd, s.groups * vd);
}

template <class F> static void run(std::vector<Task>& tasks, F each) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return (a.q1 - a.q0) * (a.k1 - a.k0) > (b.q1 - b.q0) * (b.k1 - b.k0);
  });
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
  Shape s{heads, groups, dim, value_dim, window, scale};
  View qs{q, strides[0], strides[1]}, ks{k, strides[2], strides[3]}, vs{v, strides[4], strides[5]};
  std::vector<Task> tasks;
  for (int64_t d = 0; d < documents; ++d)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t q0 = 0, length = bounds[d + 1] - bounds[d]; q0 < length; q0 += CHUNK) {
        int64_t q1 = std::min(q0 + CHUNK, length);
        tasks.push_back({bounds[d], g, q0, q1, 0, q1, true, false});
      }
  int64_t tokens = bounds[documents];
  run(tasks, [&](const Task& t, Scratch& w) { forward(t, s, qs, ks, vs, o, lse, tokens, w); });
}

// o and d_out are contiguous; dq, dk, dv (contiguous) are written whole.
extern "C" void document_attention_backward_bf16(const bf16* q, const bf16* k, const bf16* v, const bf16* o,
                                                 const bf16* d_out, const float* lse, bf16* dq, bf16* dk, bf16* dv,
                                                 const int64_t* bounds, int64_t documents, const int64_t* strides,
                                                 int64_t heads, int64_t groups, int64_t dim, int64_t value_dim,
                                                 int64_t window, float scale) {
  Shape s{heads, groups, dim, value_dim, window, scale};
  View qs{q, strides[0], strides[1]}, ks{k, strides[2], strides[3]}, vs{v, strides[4], strides[5]};
  View os{o, heads * value_dim, value_dim}, ds{d_out, heads * value_dim, value_dim};
  std::vector<Task> tasks;
  for (int64_t d = 0; d < documents; ++d)
    for (int64_t g = 0; g < groups; ++g) {
      int64_t length = bounds[d + 1] - bounds[d];
      // One task finds both gradients of a document. Where so few documents would leave threads idle, long ones are cut:
      // then a task finds those of some queries or of some keys, and scores are computed twice.
      bool cut = length > CHUNK && documents * groups < ENOUGH;
      if (!cut) tasks.push_back({bounds[d], g, 0, length, 0, length, true, true});
      for (int64_t at = 0; cut && at < length; at += CHUNK) {
        int64_t stop = std::min(at + CHUNK, length);
        int64_t first = window > 0 ? std::max<int64_t>(at - window + 1, 0) : 0;
        int64_t last = window > 0 ? std::min(stop + window - 1, length) : length;
        tasks.push_back({bounds[d], g, at, stop, first, stop, true, false});
        tasks.push_back({bounds[d], g, at, last, at, stop, false, true});
      }
    }
  int64_t tokens = bounds[documents];
  run(tasks, [&](const Task& t, Scratch& w) {
    backward(t, s, qs, ks, vs, os, ds, lse, dq, dk, dv, tokens, w);
  });
}

#else

extern "C" void document_attention_bf16() {}
extern "C" void document_attention_backward_bf16() {}

#endif
