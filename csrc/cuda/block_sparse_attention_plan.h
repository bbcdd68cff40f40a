// How block_sparse_attention is cut into thread blocks.
#pragma once
#include <algorithm>

#include "block_sparse_attention_tile.h"
#include "plan.h"

namespace sparse_attn {

struct BlockSparseAttentionPlan {
  LaunchPlan launch;
  int64_t dim, rows;  // the AttentionTile that the kernel is compiled for
  int64_t queries, heads, query_tiles, head_tiles, splits;
  int64_t tiles;
  // Scratch memory, none where nothing is split: `done`, which is zero at the start, and after it
  // part_values and part_stats.
  int64_t done_bytes, values_bytes, stats_bytes;

  int64_t workspace_bytes() const { return done_bytes + values_bytes + stats_bytes; }

  BlockSparseAttentionCudaParams params(const BlockSparseAttentionParams& call,
                                        void* workspace) const {
    BlockSparseAttentionCudaParams p{call};
    p.key_row_bytes = static_cast<int32_t>(2 * call.key_stride[2]);
    p.value_row_bytes = static_cast<int32_t>(2 * call.value_stride[2]);
    p.key_page_bytes = 2 * call.key_stride[0], p.value_page_bytes = 2 * call.value_stride[0];
    p.queries = static_cast<int32_t>(queries), p.heads = static_cast<int32_t>(heads);
    p.query_tiles = static_cast<int32_t>(query_tiles);
    p.head_tiles = static_cast<int32_t>(head_tiles), p.splits = static_cast<int32_t>(splits);
    auto* const bytes = static_cast<char*>(workspace);
    p.done = reinterpret_cast<int32_t*>(bytes);
    p.part_values = reinterpret_cast<float*>(bytes + done_bytes);
    p.part_stats = reinterpret_cast<float*>(bytes + done_bytes + values_bytes);
    return p;
  }
};

// Blocks that share the keys of a tile: as many as fill the GPU twice, four tiles of keys each.
inline int64_t attention_splits(int64_t tiles, int64_t key_tiles, int64_t processors) {
  if (tiles >= processors) return 1;
  constexpr int64_t kMost = 128;
  return std::max<int64_t>(1, std::min({ceil_div(2 * processors, tiles), key_tiles / 4, kMost}));
}

// Shapes and the number of multiprocessors decide, never what is listed. D, Dv: at most 256.
inline BlockSparseAttentionPlan plan_block_sparse_attention(const BlockSparseAttentionParams& p,
                                                            const DeviceLimits& limits) {
  const int64_t widest = std::max(p.D, p.Dv), group = p.Hq / p.Hkv;
  const int dim = *std::find_if(std::begin(kAttentionDims), std::end(kAttentionDims) - 1,
                                [&](int d) { return d >= widest; });
  const int64_t most = dim <= 128 ? 128 : 64, block = std::min(p.q_block, p.Tq);
  const bool share_list = p.Hq / p.Hi >= group;

  BlockSparseAttentionPlan plan{};
  plan.queries = std::min(block, most);
  plan.heads = share_list ? std::min(group, most / plan.queries) : 1;
  const int64_t rows = plan.queries * plan.heads;
  plan.dim = dim, plan.rows = rows <= 16 ? 16 : rows <= 64 ? 64 : 128;
  plan.query_tiles = ceil_div(block, plan.queries);
  plan.head_tiles = ceil_div(group, plan.heads);
  plan.tiles = p.B * p.Hkv * p.Mq * plan.query_tiles * plan.head_tiles;

  const AttentionTile tile{dim, static_cast<int>(plan.rows)};
  const int64_t edges = std::min(p.sink, p.Tk) + std::min(p.window, p.Tk);
  const int64_t most_keys = std::min(p.Tk, p.K * p.kv_block + edges);
  plan.splits = attention_splits(plan.tiles, most_keys / tile.keys(), limits.processors);
  if (plan.splits > 1) {
    const int64_t part_rows = plan.tiles * plan.splits * rows;
    plan.done_bytes = round_up(plan.tiles * 4, 16);
    plan.values_bytes = part_rows * p.Dv * 4, plan.stats_bytes = part_rows * 8;
  }
  plan.launch.grid[0] = plan.tiles * plan.splits;
  plan.launch.block[0] = tile.threads();
  plan.launch.shared_bytes = tile.shared_bytes(p.page_bits != 0);
  return plan;
}

// Calls `f.operator()<kDim, kRows>()` with the plan's tile.
template <class Plan, class F>
void with_attention_tile(const Plan& plan, const F& f) {
  const auto with_rows = [&]<int kDim>() {
    if (plan.rows == 16) return f.template operator()<kDim, 16>();
    if constexpr (kDim <= 128)
      if (plan.rows == 128) return f.template operator()<kDim, 128>();
    return f.template operator()<kDim, 64>();
  };
  switch (plan.dim) {
    case 64: return with_rows.template operator()<64>();
    case 96: return with_rows.template operator()<96>();
    case 128: return with_rows.template operator()<128>();
    default: return with_rows.template operator()<256>();
  }
}

}  // namespace sparse_attn
