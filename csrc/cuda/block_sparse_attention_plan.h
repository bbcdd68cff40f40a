// How a call of block_sparse_attention is cut into thread blocks: decided on the host, from shapes
// and the number of multiprocessors alone.
#pragma once
#include <algorithm>

#include "block_sparse_attention_tile.h"

namespace sparse_attn {

struct BlockSparseAttentionPlan {
  AttentionTile tile;
  int32_t queries, heads, query_tiles, head_tiles, splits;
  int64_t tiles;      // row tiles of the call
  int64_t part_rows;  // rows of part_values and part_stats; 0 where nothing is split

  int64_t grid() const { return tiles * splits; }

  void fill(BlockSparseAttentionCudaParams& p) const {
    p.queries = queries, p.heads = heads, p.query_tiles = query_tiles;
    p.head_tiles = head_tiles, p.splits = splits;
  }
};

static inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Blocks that share the keys of a tile: as many as fill the GPU, each with four tiles of keys.
static inline int64_t attention_splits(int64_t tiles, int64_t key_tiles, int64_t processors) {
  if (tiles >= processors) return 1;
  const int64_t wanted = ceil_div(2 * processors, tiles);
  return std::max<int64_t>(1, std::min({wanted, key_tiles / 4, int64_t{128}}));
}

// D and Dv are at most 256.
static inline BlockSparseAttentionPlan plan_block_sparse_attention(
    const BlockSparseAttentionParams& p, int64_t processors) {
  const int64_t widest = std::max(p.D, p.Dv), group = p.Hq / p.Hkv;
  const int dim = *std::find_if(std::begin(kAttentionDims), std::end(kAttentionDims) - 1,
                                [&](int d) { return d >= widest; });
  const int64_t most = dim <= 128 ? 128 : 64, block = std::min(p.q_block, p.Tq);
  const int64_t queries = std::min(block, most);
  const bool share_list = p.Hq / p.Hi >= group;
  const int64_t heads = share_list ? std::min(group, most / queries) : 1;
  const int64_t rows = queries * heads;

  BlockSparseAttentionPlan plan{};
  plan.tile = {dim, rows <= 16 ? 16 : rows <= 64 ? 64 : 128};
  plan.queries = static_cast<int32_t>(queries), plan.heads = static_cast<int32_t>(heads);
  plan.query_tiles = static_cast<int32_t>(ceil_div(block, queries));
  plan.head_tiles = static_cast<int32_t>(ceil_div(group, heads));
  plan.tiles = p.B * p.Hkv * p.Mq * plan.query_tiles * plan.head_tiles;
  const int64_t listed = std::min(p.Tk, p.K * p.kv_block + p.sink + p.window);
  plan.splits = static_cast<int32_t>(
      attention_splits(plan.tiles, listed / plan.tile.keys(), processors));
  plan.part_rows = plan.splits == 1 ? 0 : plan.grid() * rows;
  return plan;
}

}  // namespace sparse_attn
