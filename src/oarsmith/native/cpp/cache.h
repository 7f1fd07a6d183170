// Keys and values in pages of some positions: in a page lies layer after layer, in that kv head after kv head, the keys,
// then the values. So memory is touched page by page, as sequences grow.
// Keys lie in groups of 16 positions, interleaved so that a line of 64 bytes is one entry (or a pair of bf16 entries)
// of all 16: a query's product with 16 keys is then the same loop as a matrix product. Values lie position by position
// in fp32; in bf16 two positions are interleaved entry by entry, so that sums over positions take two at a time.
// In 8 bits they lie otherwise (rounded.h, fixed.h), and are brought into this form when they are read.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "fixed.h"
#include "memory.h"

// Kept as they are read; in 8 bits with scales that come with them; or with scales of heads that are known before.
enum class CacheForm : int32_t { EXACT, GROUPS, FIXED_INT, FIXED_E4M3 };

struct CacheLayer {
  int64_t kv_heads, key_dim, value_dim;
  int64_t offset, key_bytes, head_bytes;  // within a page
  std::vector<float> key_scales, value_scales;  // of each head, where they are known before
};

class Cache {
 public:
  // dims: kv heads, key dim and value dim of each layer; dims are multiples of 16, as is the page size in positions.
  // scales: layer by layer those of each head's keys, then of its values; null: all are 1.
  Cache(Stored stored, CacheForm form, int64_t layers, const int64_t* dims, const float* scales, int64_t pages,
        int64_t page_size)
      : stored(stored), page_size(page_size), form_(form) {
    for (int64_t i = 0; i < layers; ++i) {
      const int64_t heads = dims[3 * i], key_dim = dims[3 * i + 1], value_dim = dims[3 * i + 2];
      const int64_t each = form == CacheForm::EXACT ? stored_bytes(stored) : 1;
      const bool groups = form == CacheForm::GROUPS;
      const int64_t key_bytes = groups ? RoundedKeys::bytes(key_dim, page_size) : page_size * key_dim * each;
      const int64_t value_bytes = groups ? RoundedValues::bytes(value_dim, page_size) : page_size * value_dim * each;
      const int64_t head_bytes = key_bytes + value_bytes;
      std::vector<float> own[2];
      for (std::vector<float>& some : own) {
        some.assign(heads, 1.0f);
        if (scales != nullptr) some.assign(scales, scales + heads), scales += heads;
      }
      layers_.push_back({heads, key_dim, value_dim, page_bytes_, key_bytes, head_bytes, own[0], own[1]});
      page_bytes_ += heads * head_bytes;
    }
    memory_ = Memory(pages * page_bytes_);
    if (memory_.data() == nullptr) throw std::bad_alloc();
  }

  const CacheLayer& layer(int64_t index) const { return layers_[index]; }

  // Keys of a page's positions from `first` on, a multiple of 16; rounded ones are brought into `room` first.
  template <Stored S>
  const uint8_t* keys(const CacheLayer& layer, int64_t page, int64_t head, int64_t first, int64_t count,
                      std::vector<uint8_t>& room) const {
    uint8_t* start = head_start(layer, page, head);
    if (form_ == CacheForm::EXACT) return start + first * layer.key_dim * stored_bytes(S);
    room.resize(std::max<size_t>(room.size(), page_size * layer.key_dim * stored_bytes(S)));
    with_keys(layer, start, head, [&](const auto& keys) { keys.template get<S>(first, count, room.data()); });
    return room.data();
  }
  template <Stored S>
  const uint8_t* values(const CacheLayer& layer, int64_t page, int64_t head, int64_t first, int64_t count,
                        std::vector<uint8_t>& room) const {
    uint8_t* start = head_start(layer, page, head) + layer.key_bytes;
    if (form_ == CacheForm::EXACT) return start + first * layer.value_dim * stored_bytes(S);
    room.resize(std::max<size_t>(room.size(), page_size * layer.value_dim * stored_bytes(S)));
    with_values(layer, start, head, [&](const auto& values) { values.template get<S>(first, count, room.data()); });
    return room.data();
  }

  void copy_page(int64_t source, int64_t target) const {
    std::memcpy(memory_.data() + target * page_bytes_, memory_.data() + source * page_bytes_, page_bytes_);
  }

  // Keeps key and value of a position of a page. `last`: the next position does not come in this step; what is there
  // must be a number then, because it is multiplied with 0.
  void put(const CacheLayer& layer, int64_t page, int64_t head, int64_t position, const float* key, const float* value,
           bool last) const {
    const int64_t group = position / 16 * 16 * layer.key_dim, place = position % 16;
    uint8_t *keys = head_start(layer, page, head), *values = keys + layer.key_bytes;
    if (form_ != CacheForm::EXACT) {
      with_keys(layer, keys, head, [&](const auto& own) { own.put(position, key); });
      with_values(layer, values, head, [&](const auto& own) { own.put(position, value, last); });
      return;
    }
    if (stored == Stored::F32) {
      float* k = reinterpret_cast<float*>(keys) + group + place;
      for (int64_t i = 0; i < layer.key_dim; ++i) k[16 * i] = key[i];
      float* v = reinterpret_cast<float*>(values) + position * layer.value_dim;
      std::memcpy(v, value, 4 * layer.value_dim);
      return;
    }
    uint16_t* k = reinterpret_cast<uint16_t*>(keys) + group + 2 * place;
    for (int64_t i = 0; i < layer.key_dim; i += 16) {
      uint16_t rounded[16];
      to_bf16(load16(key + i), rounded);
      for (int64_t j = 0; j < 16; j += 2) std::memcpy(k + 16 * (i + j), rounded + j, 4);
    }
    const int64_t odd = position % 2;
    uint16_t* v = reinterpret_cast<uint16_t*>(values) + (position - odd) * layer.value_dim + odd;
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
  uint8_t* head_start(const CacheLayer& layer, int64_t page, int64_t head) const {
    return memory_.data() + page * page_bytes_ + layer.offset + head * layer.head_bytes;
  }

  // f of a head's keys or values in 8 bits.
  template <class F>
  void with_keys(const CacheLayer& layer, uint8_t* start, int64_t head, F&& f) const {
    const int64_t dim = layer.key_dim;
    if (form_ == CacheForm::GROUPS) return f(RoundedKeys(start, dim, page_size));
    if (form_ == CacheForm::FIXED_INT) return f(FixedKeys<Code::INT>{start, dim, layer.key_scales[head]});
    f(FixedKeys<Code::E4M3>{start, dim, layer.key_scales[head]});
  }
  template <class F>
  void with_values(const CacheLayer& layer, uint8_t* start, int64_t head, F&& f) const {
    const int64_t dim = layer.value_dim;
    if (form_ == CacheForm::GROUPS) return f(RoundedValues(start, dim, page_size));
    if (form_ == CacheForm::FIXED_INT) return f(FixedValues<Code::INT>{start, dim, layer.value_scales[head]});
    f(FixedValues<Code::E4M3>{start, dim, layer.value_scales[head]});
  }

  const CacheForm form_;
  std::vector<CacheLayer> layers_;
  int64_t page_bytes_ = 0;
  Memory memory_;
};
