// Finds the queries that see the keys of a tile: a BlockIndex read from the keys' side.
#pragma once
#include <algorithm>
#include <vector>

#include "block_sparse_attention_backward.h"
#include "key_groups.h"

namespace sparse_attn {

class QueryRuns {
 public:
  // In the order of heads and queries, so that sums over them have one order.
  void build(const BlockSparseAttentionParams& p, const KeyTile& tile) {
    runs_.clear();
    const int64_t group = p.Hq / p.Hkv;
    for (int64_t h = tile.kv_head * group; h < (tile.kv_head + 1) * group; ++h)
      for (int64_t m = 0; m < p.Mq; ++m) add(p, tile, h, m);
  }

  const QueryRun* data() const { return runs_.data(); }
  int64_t size() const { return static_cast<int64_t>(runs_.size()); }

 private:
  void add(const BlockSparseAttentionParams& p, const KeyTile& tile, int64_t head, int64_t m) {
    const int64_t query = m * p.q_block, queries = std::min(p.q_block, p.Tq - query);
    const int64_t first = p.Tk - p.Tq + query, last = first + queries - 1;  // positions
    if (p.causal && last < tile.key) return;
    const bool window = p.window > 0 && last >= tile.key && first - p.window < tile.key + tile.keys;
    QueryRun run{static_cast<int32_t>(head), static_cast<int32_t>(query),
                 static_cast<int32_t>(queries), window, {}};
    bool any = window;
    any |= see(run, tile, 0, p.sink);
    if (p.K > 0) {
      const int64_t h = index_head(p, head);
      const int32_t* ids = p.indices + tile.batch * p.indices_stride[0] + h * p.indices_stride[1] +
                           m * p.indices_stride[2];
      const int32_t* end = ids + p.counts[tile.batch * p.counts_stride[0] +
                                          h * p.counts_stride[1] + m * p.counts_stride[2]];
      for (ids = std::lower_bound(ids, end, tile.key / p.kv_block);
           ids < end && *ids * p.kv_block < tile.key + tile.keys; ++ids)
        any |= see(run, tile, *ids * p.kv_block, (*ids + 1) * p.kv_block);
    }
    if (any) runs_.push_back(run);
  }

  static bool see(QueryRun& run, const KeyTile& tile, int64_t begin, int64_t end) {
    begin = std::max(begin, tile.key), end = std::min(end, tile.key + tile.keys);
    for (int64_t j = begin - tile.key; j < end - tile.key; ++j) run.seen[j / 32] |= 1u << j % 32;
    return begin < end;
  }

  std::vector<QueryRun> runs_;
};

}  // namespace sparse_attn
