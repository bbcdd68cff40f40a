// Keys of a cache, in pages or in one piece per sequence: its checks and its parameters.
#pragma once
#include <optional>

#include "stable.h"

namespace sparse_attn {

// What a call on a cache has beside it.
struct KeyCache {
  std::optional<Tensor> block_table, kv_lengths;

  // how many keys a sequence has room for
  int64_t capacity(const Tensor& key) const {
    return block_table.has_value() ? block_table->size(1) * key.size(2) : key.size(2);
  }
};

inline void check_pages(const Tensor& x, const char* name, const KeyCache& cache) {
  SA_CHECK(!cache.block_table.has_value() || x.stride(3) == 1 || x.size(3) == 1, name,
           ": pages need a contiguous last dimension");
}

inline void check_key_cache(const Tensor& query, const Tensor& key, const KeyCache& cache) {
  const int64_t B = query.size(0);
  if (cache.kv_lengths.has_value()) {
    const Tensor& n = *cache.kv_lengths;
    SA_CHECK(n.dim() == 1 && n.scalar_type() == ScalarType::Int && n.size(0) == B,
             "kv_lengths: expected int32 [B]");
  }
  if (!cache.block_table.has_value()) {
    SA_CHECK(key.size(0) == B, "key: batch size differs from query's");
    return;
  }
  const Tensor& table = *cache.block_table;
  SA_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Int && table.size(0) == B &&
               table.size(1) > 0,
           "block_table: expected int32 [B, pages of a sequence], not empty");
  const int64_t size = key.size(2);
  SA_CHECK(size >= 16 && size <= 128 && (size & (size - 1)) == 0, "key: page_size is ", size,
           ", expected 16, 32, 64 or 128");
  check_pages(key, "key", cache);
}

// The cache as kernels read it: lengths in one piece, rows of the table too.
inline KeyCache readable(const KeyCache& cache) {
  KeyCache c = cache;
  if (c.kv_lengths.has_value()) c.kv_lengths = last_dim_contiguous(*c.kv_lengths);
  if (c.block_table.has_value()) c.block_table = last_dim_contiguous(*c.block_table);
  return c;
}

// `cache` is a readable one and must outlive the call.
template <class Params>
void set_key_cache(Params& p, const Tensor& key, const KeyCache& cache) {
  p.Tk = cache.capacity(key);
  if (cache.kv_lengths.has_value()) p.kv_lengths = cache.kv_lengths->const_data_ptr<int32_t>();
  if (!cache.block_table.has_value()) return;
  p.block_table = cache.block_table->const_data_ptr<int32_t>();
  p.block_table_stride = cache.block_table->stride(0), p.pages = key.size(0);
  while (key.size(2) >> p.page_bits > 1) ++p.page_bits;
}

}  // namespace sparse_attn
