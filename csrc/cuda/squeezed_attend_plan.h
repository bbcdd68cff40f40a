// How squeezed_attend is cut into tiles of rows, and how many blocks share them.
#pragma once
#include <algorithm>

#include "block_sparse_attention_plan.h"
#include "squeezed_attend_params.h"

namespace sparse_attn {

struct SqueezedAttendPlan {
  LaunchPlan launch;
  int64_t dim, rows;  // the AttentionTile that the kernel is compiled for
  int64_t queries, heads, query_tiles, head_tiles, items;
  // scratch memory: `done`, which is zero at the start, and after it part_values and part_stats
  int64_t done_bytes, values_bytes, stats_bytes;

  int64_t workspace_bytes() const { return done_bytes + values_bytes + stats_bytes; }

  SqueezedAttendCudaParams params(const SqueezedAttendCall& call, void* workspace) const {
    SqueezedAttendCudaParams p{call};
    p.queries = static_cast<int32_t>(queries), p.heads = static_cast<int32_t>(heads);
    p.query_tiles = static_cast<int32_t>(query_tiles);
    p.head_tiles = static_cast<int32_t>(head_tiles), p.items = items;
    auto* const bytes = static_cast<char*>(workspace);
    p.done = reinterpret_cast<int32_t*>(bytes);
    p.part_values = reinterpret_cast<float*>(bytes + done_bytes);
    p.part_stats = reinterpret_cast<float*>(bytes + done_bytes + values_bytes);
    return p;
  }
};

// Shapes and the GPU decide, never what is kept: as many blocks as are resident at once, no more
// than there can be units. D, Dv: at most 256.
inline SqueezedAttendPlan plan_squeezed_attend(const SqueezedAttendCall& c,
                                               const DeviceLimits& limits) {
  const int64_t widest = std::max(c.D, c.Dv), list_heads = c.Hq / c.Hd;
  const int dim = *std::find_if(std::begin(kAttentionDims), std::end(kAttentionDims) - 1,
                                [&](int d) { return d >= widest; });
  const int64_t most = dim <= 128 ? 128 : 64;

  SqueezedAttendPlan plan{};
  plan.queries = std::min(c.Tq, most), plan.heads = std::min(list_heads, most / plan.queries);
  const int64_t rows = plan.queries * plan.heads;
  plan.dim = dim, plan.rows = rows <= 16 ? 16 : rows <= 64 ? 64 : 128;
  plan.query_tiles = ceil_div(c.Tq, plan.queries);
  plan.head_tiles = ceil_div(list_heads, plan.heads);
  plan.items = c.B * c.Hd * plan.head_tiles * plan.query_tiles;

  const AttentionTile tile{dim, static_cast<int>(plan.rows)};
  const int64_t wanted = plan.rows == 16 ? 3 : plan.rows == 64 ? 2 : 1;
  const int64_t resident = std::max<int64_t>(
      1, std::min<int64_t>(wanted, limits.shared_bytes / tile.shared_bytes()));
  const int64_t tiles = ceil_div(c.Tk, tile.keys()) + ceil_div(c.N, tile.keys());
  const int64_t blocks = std::min(resident * limits.processors,
                                  plan.items * ceil_div(tiles, kUnitKeys / tile.keys()));
  plan.done_bytes = round_up(plan.items * 4, 16);
  plan.values_bytes = blocks * 2 * rows * c.Dv * 4, plan.stats_bytes = blocks * 2 * rows * 8;
  plan.launch.grid[0] = blocks;
  plan.launch.block[0] = tile.threads();
  plan.launch.shared_bytes = tile.shared_bytes();
  return plan;
}

}  // namespace sparse_attn
