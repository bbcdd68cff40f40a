// How flex_prefill_select is launched, and the scratch memory that it needs.
#pragma once
#include "flex_prefill_select_params.h"
#include "plan.h"

namespace sparse_attn {

struct FlexPrefillPlan {
  int64_t chooses;  // or lists every visible block
  int64_t per_row;  // some head may choose per row
  LaunchPlan mean_key, extent, profile, attribute, block_sum, choose, mean_query, block_score, list;
};

// Completes the sizes in p from the shapes, the budgets in tokens (no bound: -1) and the options.
static inline void size_flex_prefill(FlexPrefillCudaParams& p, int64_t min_budget,
                                     int64_t max_budget) {
  constexpr int64_t kWantedBlocks = 1024, kMostChunks = 64, kLeastTiles = 4;
  p.Mq = ceil_div(p.Tq, p.block), p.Nk = ceil_div(p.Tk, p.block);
  const auto to_blocks = [&](int64_t tokens) {
    return ceil_div(tokens < p.Tk ? tokens : p.Tk, p.block);
  };
  p.low = to_blocks(min_budget), p.high = max_budget < 0 ? p.Nk : to_blocks(max_budget);
  const int64_t tiles = ceil_div(p.Tk, kTileKeys);
  // every chunk is read by all blocks of threads of its head, so that there must not be too many
  p.chunk_tiles = kLeastTiles;
  for (const int64_t least : {ceil_div(p.B * p.Hq * tiles, kWantedBlocks),
                              ceil_div(tiles, kMostChunks)})
    if (p.chunk_tiles < least) p.chunk_tiles = least;
  p.chunks = ceil_div(tiles, p.chunk_tiles);
  p.log2_scale = p.scale * 1.44269504f;
}

static inline FlexPrefillPlan plan_flex_prefill_select(const FlexPrefillCudaParams& p) {
  const auto launch = [](int64_t blocks, int64_t threads, int64_t shared_bytes) {
    LaunchPlan plan;
    plan.grid[0] = blocks, plan.block[0] = threads, plan.shared_bytes = shared_bytes;
    return plan;
  };
  const int64_t heads = p.B * p.Hq;
  const int64_t rows = ceil_div(p.D, kSliceDims) * kProbeRows + kProbeStages * kTileKeys;
  const int64_t slices = rows * kSliceDims * element_bytes(p.dtype);
  const int64_t mean = kMeanThreads * 8 * sizeof(float);
  FlexPrefillPlan plan;
  plan.chooses = p.gamma < 1, plan.per_row = plan.chooses && p.tau > 0;
  plan.mean_key = launch(p.B * p.Hkv * p.Nk, kMeanThreads, mean);
  plan.extent = launch(heads * p.chunks, kProbeThreads, slices);
  plan.profile = launch(heads * p.chunks, kProbeThreads, kProfileSharedBytes + slices);
  plan.attribute = plan.profile;
  plan.block_sum = launch(heads * ceil_div(p.Nk, kSumBlocks), kSumThreads,
                          mean + p.D * static_cast<int64_t>(sizeof(float)));
  plan.choose = launch(heads, kChooseThreads, kChooseSharedBytes);
  plan.mean_query = launch(heads * p.Mq, kMeanThreads, mean);
  plan.block_score =
      launch(heads * ceil_div(p.Mq, kScoreRows) * ceil_div(p.Nk, kScoreColumns), kScoreThreads,
             kScoreDims * (kScoreRows + kScoreColumns + 2) * sizeof(float));
  plan.list = launch(heads * p.Mq, kListThreads, kListSharedBytes);
  return plan;
}

// Calls buffer(name, pointer, number of elements) for each part of the scratch memory.
template <class Buffer>
void each_flex_prefill_buffer(FlexPrefillCudaParams& p, const FlexPrefillPlan& plan,
                              Buffer buffer) {
  if (!plan.chooses) return;
  const int64_t heads = p.B * p.Hq, edges = heads * p.chunks * kProbeRows;
  buffer("extent", p.extent, 2 * edges);
  buffer("finite", p.finite, heads);
  buffer("vertical", p.vertical, heads * p.Tk);
  buffer("slash", p.slash, heads * p.Tk);
  buffer("slash_spill", p.slash_spill, edges);
  buffer("columns", p.columns, heads * p.Tk);
  buffer("diagonals", p.diagonals, heads * p.Tk);
  buffer("diagonal_spill", p.diagonal_spill, edges);
  buffer("mean_key", p.mean_key, p.B * p.Hkv * p.Nk * p.D);
  if (plan.per_row) buffer("mean_query", p.mean_query, heads * p.Mq * p.D);
  buffer("mass", p.mass, heads * p.Nk);
  buffer("ranked", p.ranked, 2 * heads * p.Nk);
  buffer("estimate", p.estimate, heads * p.Nk);
  buffer("flags", p.flags, heads * p.Nk);
  buffer("state", p.state, heads);
}

// Gives each buffer its place in one piece of memory; returns the bytes of that. Without memory
// nothing but the size comes of it.
static inline int64_t place_flex_prefill_buffers(FlexPrefillCudaParams& p,
                                                 const FlexPrefillPlan& plan, char* memory) {
  int64_t bytes = 0;
  each_flex_prefill_buffer(p, plan, [&](const char*, auto*& pointer, int64_t n) {
    if (memory != nullptr) pointer = reinterpret_cast<decltype(pointer + 0)>(memory + bytes);
    bytes = round_up(bytes + n * static_cast<int64_t>(sizeof(*pointer)), 256);
  });
  return bytes;
}

}  // namespace sparse_attn
