// Keys and values in pages of some positions: in a page lies layer after layer, in that kv head after kv head, the keys,
// then the values. So memory is touched page by page, as sequences grow.
// Keys lie in groups of 16 positions, interleaved so that a line of 64 bytes is one entry (or a pair of bf16 entries)
// of all 16: a query's product with 16 keys is then the same loop as a matrix product. Values lie position by position
// in fp32; in bf16 two positions are interleaved entry by entry, so that sums over positions take two at a time.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "memory.h"
#include "vec.h"

enum class Stored : int32_t { F32 = 0, BF16 = 1 };

static inline int64_t stored_bytes(Stored stored) { return stored == Stored::F32 ? 4 : 2; }

struct CacheLayer {
  int64_t kv_heads, key_dim, value_dim;
  int64_t offset, key_bytes, head_bytes;  // within a page
};

class Cache {
 public:
  // dims: kv heads, key dim and value dim of each layer; dims are multiples of 16, as is the page size in positions.
  Cache(Stored stored, int64_t layers, const int64_t* dims, int64_t pages, int64_t page_size)
      : stored(stored), page_size(page_size) {
    for (int64_t i = 0; i < layers; ++i) {
      const int64_t heads = dims[3 * i], key_dim = dims[3 * i + 1], value_dim = dims[3 * i + 2];
      const int64_t key_bytes = page_size * key_dim * stored_bytes(stored);
      const int64_t head_bytes = key_bytes + page_size * value_dim * stored_bytes(stored);
      layers_.push_back({heads, key_dim, value_dim, page_bytes_, key_bytes, head_bytes});
      page_bytes_ += heads * head_bytes;
    }
    memory_ = Memory(pages * page_bytes_);
    if (memory_.data() == nullptr) throw std::bad_alloc();
  }

  const CacheLayer& layer(int64_t index) const { return layers_[index]; }

  uint8_t* keys(const CacheLayer& layer, int64_t page, int64_t head) const {
    return memory_.data() + page * page_bytes_ + layer.offset + head * layer.head_bytes;
  }
  uint8_t* values(const CacheLayer& layer, int64_t page, int64_t head) const {
    return keys(layer, page, head) + layer.key_bytes;
  }

  void copy_page(int64_t source, int64_t target) const {
    std::memcpy(memory_.data() + target * page_bytes_, memory_.data() + source * page_bytes_, page_bytes_);
  }

  // Keeps key and value of a position of a page. `last`: the next position does not come in this step; what is there
  // must be a number then, because it is multiplied with 0.
  void put(const CacheLayer& layer, int64_t page, int64_t head, int64_t position, const float* key, const float* value,
           bool last) const {
    const int64_t group = position / 16 * 16 * layer.key_dim, place = position % 16;
    if (stored == Stored::F32) {
      float* k = reinterpret_cast<float*>(keys(layer, page, head)) + group + place;
      for (int64_t i = 0; i < layer.key_dim; ++i) k[16 * i] = key[i];
      float* v = reinterpret_cast<float*>(values(layer, page, head)) + position * layer.value_dim;
      std::memcpy(v, value, 4 * layer.value_dim);
      return;
    }
    uint16_t* k = reinterpret_cast<uint16_t*>(keys(layer, page, head)) + group + 2 * place;
    for (int64_t i = 0; i < layer.key_dim; i += 16) {
      uint16_t rounded[16];
      to_bf16(load16(key + i), rounded);
      for (int64_t j = 0; j < 16; j += 2) std::memcpy(k + 16 * (i + j), rounded + j, 4);
    }
    const int64_t odd = position % 2;
    uint16_t* v = reinterpret_cast<uint16_t*>(values(layer, page, head)) + (position - odd) * layer.value_dim + odd;
    for (int64_t i = 0; i < layer.value_dim; i += 16) {
      uint16_t rounded[16];
      to_bf16(load16(value + i), rounded);
      for (int64_t j = 0; j < 16; ++j) v[2 * (i + j)] = rounded[j];
      if (last && !odd)
        for (int64_t j = 0; j < 16; ++j) v[2 * (i + j) + 1] = 0;
    }
  }

  const Stored stored;
  const int64_t page_size;

 private:
  std::vector<CacheLayer> layers_;
  int64_t page_bytes_ = 0;
  Memory memory_;
};
