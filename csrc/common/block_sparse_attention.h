// The checks of block_sparse_attention and its parameters, for the bindings of every device.
#pragma once
#include <cmath>
#include <optional>

#include "key_cache.h"
#include "stable.h"

namespace sparse_attn {

// The Python side says all of this better; a direct call of the overload must be safe as well.
inline void check_block_sparse_attention(const Tensor& query, const Tensor& key,
                                         const Tensor& value, const Tensor& indices,
                                         const Tensor& counts, int64_t q_block, int64_t kv_block,
                                         int64_t sink, int64_t window,
                                         std::optional<double> scale,
                                         const KeyCache& cache = {}) {
  SA_CHECK(query.dim() == 4 && query.numel() > 0, "query: expected [B, Hq, Tq, D], not empty");
  SA_CHECK(key.dim() == 4 && key.numel() > 0, "key: expected [B, Hkv, Tk, D], not empty");
  SA_CHECK(value.dim() == 4 && value.numel() > 0, "value: expected [B, Hkv, Tk, Dv], not empty");
  dtype_of(query, "query");
  SA_CHECK(key.scalar_type() == query.scalar_type(), "key: dtype differs from query's");
  SA_CHECK(value.scalar_type() == query.scalar_type(), "value: dtype differs from query's");
  check_key_cache(query, key, cache);
  check_pages(value, "value", cache);
  SA_CHECK(key.size(3) == query.size(3), "key: head_dim differs from query's");
  SA_CHECK(value.size(0) == key.size(0) && value.size(1) == key.size(1) &&
               value.size(2) == key.size(2),
           "value: batch size or pages, number of heads or length differs from key's");
  SA_CHECK(query.size(1) % key.size(1) == 0, "query: heads are no multiple of key's");
  check_lengths(query.size(2), cache.capacity(key));
  SA_CHECK(q_block >= 1 && q_block <= 128, "q_block: got ", q_block, ", expected 1 to 128");
  SA_CHECK(kv_block >= 1 && kv_block <= 128, "kv_block: got ", kv_block, ", expected 1 to 128");
  SA_CHECK(indices.dim() == 4 && indices.scalar_type() == ScalarType::Int,
           "indices: expected int32 [B, Hi, Mq, K]");
  SA_CHECK(counts.dim() == 3 && counts.scalar_type() == ScalarType::Int,
           "counts: expected int32 [B, Hi, Mq]");
  const int64_t Hi = indices.size(1);
  SA_CHECK(indices.size(0) == query.size(0) &&
               (Hi == 1 || Hi == key.size(1) || Hi == query.size(1)) &&
               indices.size(2) == (query.size(2) + q_block - 1) / q_block,
           "indices: batch size, heads or query blocks do not fit the query");
  for (int i = 0; i < 3; ++i)
    SA_CHECK(counts.size(i) == indices.size(i), "counts: shape differs from that of indices");
  SA_CHECK(sink >= 0, "sink: got ", sink, ", expected 0 or more");
  SA_CHECK(window >= 0, "window: got ", window, ", expected 0 or more");
  check_scale(scale);
}

// All but results, blocks, sink, window and causality; `cache` is a readable one.
inline BlockSparseAttentionParams block_sparse_attention_inputs(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& indices,
    const Tensor& counts, std::optional<double> scale, const KeyCache& cache = {}) {
  BlockSparseAttentionParams p{};
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  p.indices = indices.const_data_ptr<int32_t>(), p.counts = counts.const_data_ptr<int32_t>();
  for (int i = 0; i < 3; ++i) {
    p.query_stride[i] = query.stride(i), p.key_stride[i] = key.stride(i);
    p.value_stride[i] = value.stride(i);
    p.indices_stride[i] = indices.stride(i), p.counts_stride[i] = counts.stride(i);
  }
  p.B = query.size(0), p.Hq = query.size(1), p.Tq = query.size(2), p.D = query.size(3);
  p.Hkv = key.size(1), p.Dv = value.size(3);
  p.Hi = indices.size(1), p.Mq = indices.size(2), p.K = indices.size(3);
  p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D))));
  p.dtype = dtype_of(query, "query");
  set_key_cache(p, key, cache);
  return p;
}

inline void set_results(BlockSparseAttentionParams& p, Tensor& out, Tensor& lse) {
  p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr<float>();
  for (int i = 0; i < 3; ++i) p.out_stride[i] = out.stride(i);
}

}  // namespace sparse_attn
