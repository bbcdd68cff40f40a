// What a call of block_sparse_attention or its backward starts with: checks, parameters, tiles.
#pragma once
#include <optional>
#include <string>

#include "../common/block_sparse_attention.h"
#include "cache_contents.h"
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

// The parameters of each sequence: Tk is how many keys it has, block_table its row of the table.
class Sequences {
 public:
  explicit Sequences(const BlockSparseAttentionParams& p) : all_(p) {
    if (p.block_table == nullptr && p.kv_lengths == nullptr) return;
    for (int64_t b = 0; b < p.B; ++b) {
      BlockSparseAttentionParams& s = own_.emplace_back(p);
      if (p.kv_lengths != nullptr) s.Tk = p.kv_lengths[b];
      if (p.block_table != nullptr) s.block_table = p.block_table + b * p.block_table_stride;
    }
  }

  const BlockSparseAttentionParams& operator[](int64_t batch) const {
    return own_.empty() ? all_ : own_[batch];
  }

  // how many keys the longest has, and all together
  int64_t longest() const {
    int64_t n = own_.empty() ? all_.Tk : 0;
    for (const auto& s : own_) n = std::max(n, s.Tk);
    return n;
  }
  int64_t keys() const {
    int64_t n = own_.empty() ? all_.B * all_.Tk : 0;
    for (const auto& s : own_) n += s.Tk;
    return n;
  }

 private:
  const BlockSparseAttentionParams& all_;
  std::vector<BlockSparseAttentionParams> own_;
};

inline std::vector<Work> make_tiles(const BlockSparseAttentionParams& p,
                                    const Sequences& sequences) {
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
          tiles.push_back({t, tokens_of(sequences[b], t)});
        }
  // longest first, so that no thread is left with a long row at the end
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Work& a, const Work& b) { return a.tokens > b.tokens; });
  return tiles;
}

// Reads every list before anything is computed from it.
inline void check_index(const BlockSparseAttentionParams& p) {
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

inline void check_cpu_call(const Tensor& query, const Tensor& key, const Tensor& value,
                           const Tensor& indices, const Tensor& counts, int64_t q_block,
                           int64_t kv_block, int64_t sink, int64_t window,
                           std::optional<double> scale, const KeyCache& cache = {}) {
  check_block_sparse_attention(query, key, value, indices, counts, q_block, kv_block, sink, window,
                               scale, cache);
  for (const std::optional<Tensor>* t : {&cache.block_table, &cache.kv_lengths})
    SA_CHECK(!t->has_value() || (*t)->is_cpu(), "block_table, kv_lengths: expected CPU tensors");
  for (const Tensor* t : {&query, &key, &value, &indices, &counts})
    SA_CHECK(t->is_cpu(), "query, key, value, indices, counts: expected CPU tensors");
}

// The tensors have a contiguous last dimension and must outlive the result; out and lse are left.
inline BlockSparseAttentionParams make_params(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& indices,
    const Tensor& counts, int64_t q_block, int64_t kv_block, bool causal, int64_t sink,
    int64_t window, std::optional<double> scale, const KeyCache& cache = {}) {
  auto p = block_sparse_attention_inputs(query, key, value, indices, counts, scale, cache);
  p.q_block = q_block, p.kv_block = kv_block, p.causal = causal;
  p.sink = std::min(sink, p.Tk), p.window = std::min(window, p.Tk + p.Tq);
  return p;
}

}  // namespace sparse_attn
