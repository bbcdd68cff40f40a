// What a call of block_sparse_attention or its backward starts with: checks, parameters, tiles.
#pragma once
#include <cmath>
#include <optional>
#include <string>

#include "../common/stable.h"
#include "key_groups.h"
#include "threads.h"

namespace sparse_attn {

struct Work {
  QueryTile tile;
  int64_t tokens;  // upper bound of the keys it attends to
};

inline int64_t tokens_of(const BlockSparseAttentionParams& p, const QueryTile& t) {
  int64_t n = p.sink + p.window;
  if (p.K > 0)
    n += p.kv_block * p.counts[t.batch * p.counts_stride[0] +
                               index_head(p, t.head) * p.counts_stride[1] +
                               t.query / p.q_block * p.counts_stride[2]];
  const int64_t reach = p.causal ? p.Tk - p.Tq + t.query + t.queries : p.Tk;
  return std::clamp<int64_t>(n, 0, std::max<int64_t>(reach, 0));
}

inline std::vector<Work> make_tiles(const BlockSparseAttentionParams& p) {
  const int64_t group = p.Hq / p.Hkv;
  const bool shared = p.K == 0 || p.Hi != p.Hq;
  int64_t step = p.K == 0 ? kMaxRows : p.q_block;
  if (!p.causal && p.window > 0) step = 1;
  const int64_t queries = std::min(step, p.Tq);
  const int64_t heads = shared ? std::clamp<int64_t>(kMaxRows / queries, 1, group) : 1;
  std::vector<Work> tiles;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t kv = 0; kv < p.Hkv; ++kv)
      for (int64_t h = kv * group; h < (kv + 1) * group; h += heads)
        for (int64_t q = 0; q < p.Tq; q += step) {
          const QueryTile t{b, kv, h, std::min(heads, (kv + 1) * group - h), q,
                            std::min(step, p.Tq - q)};
          tiles.push_back({t, tokens_of(p, t)});
        }
  // longest first, so that no thread is left with a long row at the end
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Work& a, const Work& b) { return a.tokens > b.tokens; });
  return tiles;
}

// Reads every list before anything is computed from it.
inline void check_index(const BlockSparseAttentionParams& p) {
  if (p.K == 0) return;
  const int64_t blocks = (p.Tk + p.kv_block - 1) / p.kv_block, rows = p.B * p.Hi * p.Mq;
  std::atomic<int64_t> bad_count{-1}, bad_row{-1};
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t m = r % p.Mq, h = r / p.Mq % p.Hi, b = r / p.Mq / p.Hi;
      const int32_t n =
          p.counts[b * p.counts_stride[0] + h * p.counts_stride[1] + m * p.counts_stride[2]];
      if (n < 0 || n > p.K) {
        bad_count = r;
        return;
      }
      const int32_t* ids = p.indices + b * p.indices_stride[0] + h * p.indices_stride[1] +
                           m * p.indices_stride[2];
      int64_t previous = -1;
      for (int32_t i = 0; i < n; previous = ids[i++])
        if (ids[i] <= previous || ids[i] >= blocks) bad_row = r;
    }
  });
  const auto where = [&](int64_t r) {
    return "[" + std::to_string(r / p.Mq / p.Hi) + ", " + std::to_string(r / p.Mq % p.Hi) + ", " +
           std::to_string(r % p.Mq) + "]";
  };
  SA_CHECK(bad_count < 0, "counts: the value at ", where(bad_count),
           " is negative or larger than the capacity of indices, ", p.K);
  SA_CHECK(bad_row < 0, "indices: row ", where(bad_row),
           " must be ascending, unique block ids in [0, ", blocks, ")");
}

// The Python side says all of this better; a direct call of the overload must be safe as well.
inline void check_arguments(const Tensor& query, const Tensor& key, const Tensor& value,
                            const Tensor& indices, const Tensor& counts, int64_t q_block,
                            int64_t kv_block, int64_t sink, int64_t window,
                            std::optional<double> scale) {
  SA_CHECK(query.dim() == 4 && query.numel() > 0, "query: expected [B, Hq, Tq, D], not empty");
  SA_CHECK(key.dim() == 4 && key.numel() > 0, "key: expected [B, Hkv, Tk, D], not empty");
  SA_CHECK(value.dim() == 4 && value.numel() > 0, "value: expected [B, Hkv, Tk, Dv], not empty");
  dtype_of(query, "query");
  SA_CHECK(key.scalar_type() == query.scalar_type(), "key: dtype differs from query's");
  SA_CHECK(value.scalar_type() == query.scalar_type(), "value: dtype differs from query's");
  SA_CHECK(key.size(0) == query.size(0) && key.size(3) == query.size(3),
           "key: batch size or head_dim differs from query's");
  SA_CHECK(value.size(0) == key.size(0) && value.size(1) == key.size(1) &&
               value.size(2) == key.size(2),
           "value: batch size, number of heads or length differs from key's");
  SA_CHECK(query.size(1) % key.size(1) == 0, "query: heads are no multiple of key's");
  SA_CHECK(q_block >= 1 && q_block <= kMaxRows, "q_block: got ", q_block, ", expected 1 to 128");
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
  SA_CHECK(std::isfinite(scale.value_or(0)), "scale: expected a finite number");
  for (const Tensor* t : {&query, &key, &value, &indices, &counts})
    SA_CHECK(t->is_cpu(), "query, key, value, indices, counts: expected CPU tensors");
}

// The tensors have a contiguous last dimension and must outlive the result; out and lse are left.
inline BlockSparseAttentionParams make_params(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& indices,
    const Tensor& counts, int64_t q_block, int64_t kv_block, bool causal, int64_t sink,
    int64_t window, std::optional<double> scale) {
  BlockSparseAttentionParams p{};
  p.B = query.size(0), p.Hq = query.size(1), p.Tq = query.size(2), p.D = query.size(3);
  p.Hkv = key.size(1), p.Tk = key.size(2), p.Dv = value.size(3);
  p.Hi = indices.size(1), p.Mq = indices.size(2), p.K = indices.size(3);
  p.q_block = q_block, p.kv_block = kv_block;
  p.sink = std::min(sink, p.Tk), p.window = std::min(window, p.Tk + p.Tq), p.causal = causal;
  p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D))));
  p.dtype = dtype_of(query, "query");
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  p.indices = indices.const_data_ptr<int32_t>(), p.counts = counts.const_data_ptr<int32_t>();
  for (int i = 0; i < 3; ++i) {
    p.query_stride[i] = query.stride(i), p.key_stride[i] = key.stride(i);
    p.value_stride[i] = value.stride(i);
    p.indices_stride[i] = indices.stride(i), p.counts_stride[i] = counts.stride(i);
  }
  return p;
}

}  // namespace sparse_attn
