// Keys and values in pages of some positions: in a page lies layer after layer, in that kv head after kv head, the keys,
// then the values. So memory is touched page by page, as sequences grow.
// Keys lie in groups of 16 positions, interleaved so that a line of 64 bytes is one entry (or a pair of bf16 entries)
// of all 16: a query's product with 16 keys is then the same loop as a matrix product. Values lie position by position.
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
  int64_t kv_heads, dim;
  int64_t offset, head_bytes;  // within a page
};

class Cache {
 public:
  // dims: kv heads and head dim of each layer; the dim is a multiple of 16. page_size: positions, a multiple of 16.
  Cache(Stored stored, int64_t layers, const int64_t* dims, int64_t pages, int64_t page_size)
      : stored(stored), page_size(page_size) {
    for (int64_t i = 0; i < layers; ++i) {
      const int64_t heads = dims[2 * i], dim = dims[2 * i + 1];
      const int64_t head_bytes = 2 * page_size * dim * stored_bytes(stored);
      layers_.push_back({heads, dim, page_bytes_, head_bytes});
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
    return keys(layer, page, head) + layer.head_bytes / 2;
  }

  void copy_page(int64_t source, int64_t target) const {
    std::memcpy(memory_.data() + target * page_bytes_, memory_.data() + source * page_bytes_, page_bytes_);
  }

  // Keeps key and value [dim] of a position of a page.
  void put(const CacheLayer& layer, int64_t page, int64_t head, int64_t position, const float* key,
           const float* value) const {
    const int64_t dim = layer.dim, group = position / 16 * 16 * dim, place = position % 16;
    if (stored == Stored::F32) {
      float* k = reinterpret_cast<float*>(keys(layer, page, head)) + group + place;
      for (int64_t i = 0; i < dim; ++i) k[16 * i] = key[i];
      std::memcpy(reinterpret_cast<float*>(values(layer, page, head)) + position * dim, value, 4 * dim);
    } else {
      uint16_t* k = reinterpret_cast<uint16_t*>(keys(layer, page, head)) + group + 2 * place;
      uint16_t* v = reinterpret_cast<uint16_t*>(values(layer, page, head)) + position * dim;
      for (int64_t i = 0; i < dim; i += 16) {
        uint16_t rounded[16];
        to_bf16(load16(key + i), rounded);
        for (int64_t j = 0; j < 16; j += 2) std::memcpy(k + 16 * (i + j), rounded + j, 4);
        to_bf16(load16(value + i), v + i);
      }
    }
  }

  const Stored stored;
  const int64_t page_size;

 private:
  std::vector<CacheLayer> layers_;
  int64_t page_bytes_ = 0;
  Memory memory_;
};
