// How the attention of whole documents is divided: tasks, blocks of queries and keys, strips.
#pragma once
#include <cstdlib>
#include <memory>
#include <vector>

#include "bf16_rows.h"

#ifdef HAS_BF16_PRODUCTS

static const int64_t ROWS = 128;   // queries of a block
static const int64_t KEYS = 128;   // keys of a block
static const int64_t STRIP = 32;   // queries whose scores are there at once
static const int64_t BAND = 4;     // blocks of keys that stay in the cache while blocks of queries pass
static const int64_t CHUNK = 512;  // queries of a forward task
static const int64_t ENOUGH = 24;  // backward tasks that keep the threads busy,
static const int64_t LEAST = 256;  // of at least so many queries,
static const int64_t PARTS = 8;    // at most so many a document and key head

// From row to row of matrices with a column a key, a pair of keys, a pair of queries. Rows a power of two apart would
// fight for the same places of the cache.
static const int64_t STRIDE = KEYS + 16, HALF = KEYS / 2 + 16, Q_HALF = ROWS / 2 + 16;

struct Shape {
  int64_t heads, groups, dim, value_dim, window;
  float scale;
  int64_t share() const { return heads / groups; }
  int64_t sums_of_block() const { return (dim + value_dim) * STRIDE; }
  int64_t first_key(int64_t query) const { return window > 0 ? std::max<int64_t>(query - window + 1, 0) : 0; }
};

// A tensor [tokens, heads, dim] with a contiguous last dimension.
struct View {
  const bf16* data;
  int64_t token, head;
  const bf16* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// Queries [q0, q1) of the document that begins at token `start`, counted from there. Their keys are the blocks
// [block0, block1), block b the keys from KEYS * b on.
struct Task {
  int64_t start, group, q0, q1, block0, block1;
  int64_t sums;  // backward, of a document cut into several: where its gradients of keys begin among those of all
  int64_t blocks() const { return block1 - block0; }
  int64_t area() const { return (q1 - q0) * blocks(); }
  int64_t keys(int64_t block) const { return std::min(KEYS, q1 - block * KEYS); }
};

static int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }
static int64_t pad32(int64_t n) { return (n + 31) / 32 * 32; }

// Memory that begins with a line of the cache and grows.
template <class T> struct Buffer {
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> memory;
  int64_t size = 0;
  T* fit(int64_t n) {
    if (n > size) {
      size = (n + 31) / 32 * 32;
      memory.reset();  // before the new, or both are there at once
      memory.reset(static_cast<T*>(std::aligned_alloc(64, size * sizeof(T))));
    }
    return memory.get();
  }
};

// Some queries from q0, at most STRIP, against a block of keys from k0. `wide` keys are computed, a multiple of 32;
// none where all are later than the queries.
struct Strip {
  int64_t q0, rows, k0, keys, wide;
  Strip(const Task& t, int64_t first, int64_t stop, int64_t block) : q0(first), rows(std::min(STRIP, stop - first)) {
    k0 = block * KEYS, keys = t.keys(block);
    wide = std::max<int64_t>(std::min(pad32(keys), pad32(q0 + rows - k0)), 0);
  }
  // Leaves x as it is where row r sees the key, and puts `other` in the rest of it.
  void mask(const Shape& s, int64_t r, float* x, float other) const {
    int64_t to = r < rows ? std::max<int64_t>(std::min({q0 + r + 1 - k0, keys, wide}), 0) : 0;
    int64_t from = std::min(std::max<int64_t>(s.first_key(q0 + r) - k0, 0), to);
    keep(x, from, to, wide, other);
  }
};

// Calls each(first query, stop, first block, last block + 1) for what blocks of queries see of a band of keys.
template <class F> static void for_blocks(const Task& t, const Shape& s, F each) {
  for (int64_t band = t.block0; band < t.block1; band += BAND)
    for (int64_t q0 = t.q0; q0 < t.q1; q0 += ROWS) {
      int64_t stop = std::min(q0 + ROWS, t.q1), first = std::max(s.first_key(q0) / KEYS, band);
      int64_t last = std::min((stop + KEYS - 1) / KEYS, band + BAND);
      if (first < last) each(q0, stop, first, last);
    }
}

static Task task_of(const Shape& s, int64_t start, int64_t group, int64_t q0, int64_t q1) {
  return {start, group, q0, q1, s.first_key(q0) / KEYS, (q1 + KEYS - 1) / KEYS, -1};
}

// Scores of a document's first `queries` queries.
static double scores_of(const Shape& s, int64_t queries) {
  int64_t full = s.window > 0 ? std::min(queries, s.window) : queries;
  return 0.5 * full * (full + 1.0) + static_cast<double>(queries - full) * full;
}

// A document's backward tasks for a key head: its queries in parts of about as many scores each. `size` is how much
// memory the parts' gradients of keys take so far; one part alone takes none.
static void cut(const Shape& s, int64_t start, int64_t length, int64_t group, int64_t parts, int64_t* size,
                std::vector<Task>& tasks) {
  double all = scores_of(s, length);
  int64_t made = 0;
  for (int64_t q0 = 0, q1 = ROWS; q0 < length; q1 += ROWS) {
    if (q1 < length && scores_of(s, q1) * parts < all * (made + 1)) continue;
    tasks.push_back(task_of(s, start, group, q0, std::min(q1, length)));
    if (parts > 1) {
      tasks.back().sums = *size;
      *size += tasks.back().blocks() * s.sums_of_block();
    }
    q0 = q1, ++made;
  }
}

// All backward tasks. A document that holds much of the work is cut, or threads would wait for one.
static std::vector<Task> cut(const Shape& s, const int64_t* bounds, int64_t documents, int64_t* size) {
  double all = 0.0;
  for (int64_t d = 0; d < documents; ++d) all += scores_of(s, bounds[d + 1] - bounds[d]) * s.groups;
  std::vector<Task> tasks;
  *size = 0;
  for (int64_t d = 0; d < documents; ++d) {
    int64_t length = bounds[d + 1] - bounds[d];
    double wanted = std::ceil(ENOUGH * scores_of(s, length) / all - 1e-9);
    int64_t parts = std::max<int64_t>(std::min({static_cast<int64_t>(wanted), PARTS, length / LEAST}), 1);
    for (int64_t g = 0; g < s.groups; ++g) cut(s, bounds[d], length, g, parts, size, tasks);
  }
  return tasks;
}

#endif
