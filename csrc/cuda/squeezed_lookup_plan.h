// How squeezed_lookup is launched, and the scratch memory that it needs.
#pragma once
#include <algorithm>

#include "plan.h"
#include "squeezed_lookup_params.h"

namespace sparse_attn {

struct SqueezedLookupPlan {
  int64_t dim, rows;  // the AttentionTile that the score kernels are compiled for
  int64_t keep;       // every score is kept: one pass
  int64_t levels;
  LaunchPlan fine_scores, coarse_scores, choose;
};

// Completes the sizes in p from the shapes. D: at most 256.
inline SqueezedLookupPlan plan_squeezed_lookup(SqueezedLookupCudaParams& p,
                                               const DeviceLimits& limits) {
  const auto& c = p.call;
  const int64_t group = c.Hq / c.Hkv, per_choice = c.Hq / c.Hd;
  const int dim = *std::find_if(std::begin(kAttentionDims), std::end(kAttentionDims) - 1,
                                [&](int d) { return d >= c.D; });
  SqueezedLookupPlan plan{};
  plan.dim = dim, plan.keep = c.Tq <= kLookupRows, plan.levels = c.coarse.K > 0 ? 2 : 1;
  plan.rows = plan.keep ? kLookupRows : dim <= 128 ? 128 : 64;
  const int64_t queries = std::min(c.Tq, plan.rows);
  const int64_t heads = plan.keep ? std::min(group, plan.rows / queries) : 1;
  const int64_t query_tiles = ceil_div(c.Tq, queries), head_tiles = ceil_div(group, heads);
  p.queries = static_cast<int32_t>(queries), p.heads = static_cast<int32_t>(heads);
  p.query_tiles = static_cast<int32_t>(query_tiles);
  p.head_tiles = static_cast<int32_t>(head_tiles);
  p.rows = static_cast<int32_t>(per_choice * c.Tq);
  p.parts = static_cast<int32_t>(plan.keep ? 0 : per_choice * query_tiles);
  p.sets = static_cast<int32_t>(plan.levels == 2 && per_choice == 1 ? heads : 1);

  const AttentionTile tile{dim, static_cast<int>(plan.rows)};
  const int64_t tiles = c.B * c.Hkv * head_tiles * query_tiles;
  const auto scores = [&](int64_t clusters, SqueezedLookupScratch& scratch, int sets) {
    constexpr int64_t kMostSplits = 128;
    const int64_t cluster_tiles = ceil_div(clusters, tile.keys());
    const int64_t splits =
        std::min({ceil_div(2 * limits.processors, tiles), cluster_tiles, kMostSplits});
    scratch.row = cluster_tiles * tile.keys(), scratch.splits = static_cast<int32_t>(splits);
    LaunchPlan launch;
    launch.grid[0] = tiles * splits, launch.block[0] = tile.threads();
    launch.shared_bytes = tile.query_bytes() + AttentionTile::kStages * tile.slot_bytes() +
                          LookupTail{tile.keys(), sets}.bytes();
    return launch;
  };
  plan.fine_scores = scores(c.fine.K, p.fine, p.sets);
  if (plan.levels == 2) plan.coarse_scores = scores(c.coarse.K, p.coarse, 1);
  plan.choose.grid[0] = c.B * c.Hd, plan.choose.block[0] = kChooseClustersThreads;
  plan.choose.shared_bytes = kChooseClustersBytes + (plan.keep ? round_up(p.rows * 4, 16) : 0);
  return plan;
}

// Gives each buffer its place in one piece of memory; returns the bytes of that. Without memory
// nothing but the size comes of it.
inline int64_t place_squeezed_lookup_buffers(SqueezedLookupCudaParams& p,
                                             const SqueezedLookupPlan& plan, char* memory) {
  const auto& c = p.call;
  int64_t bytes = 0;
  const auto place = [&](auto*& pointer, int64_t n) {
    if (memory != nullptr) pointer = reinterpret_cast<decltype(pointer + 0)>(memory + bytes);
    bytes = round_up(bytes + n * static_cast<int64_t>(sizeof(*pointer)), 256);
  };
  const auto place_level = [&](SqueezedLookupScratch& scratch, int64_t clusters) {
    place(scratch.extent, c.B * c.Hq * c.Tq * scratch.splits * 2);
    place(scratch.scores, c.B * c.Hq * (plan.keep ? c.Tq : p.query_tiles) * scratch.row);
    place(scratch.kept, c.B * c.Hd * ceil_div(clusters, 32));
  };
  place_level(p.fine, c.fine.K);
  if (plan.levels == 2) {
    place_level(p.coarse, c.coarse.K);
    place(p.alive, c.B * c.Hd * c.fine.K);
  }
  return bytes;
}

// Calls `scores.operator()<kDim, kRows, kMode>(launch, params)` and `choose(launch, params)` in
// their order.
template <class Scores, class Choose>
void each_squeezed_lookup_launch(const SqueezedLookupCudaParams& params,
                                 const SqueezedLookupPlan& plan, const Scores& scores,
                                 const Choose& choose) {
  for (int level = static_cast<int>(plan.levels) - 1; level >= 0; --level) {
    SqueezedLookupCudaParams p = params;
    p.at_coarse = level;
    const LaunchPlan& launch = level == 0 ? plan.fine_scores : plan.coarse_scores;
    const auto with_dim = [&]<int kDim>() {
      if (plan.keep != 0) {
        scores.template operator()<kDim, kLookupRows, kKeepScores>(launch, p);
      } else {
        constexpr int kRows = kDim <= 128 ? 128 : 64;
        scores.template operator()<kDim, kRows, kFindExtents>(launch, p);
        scores.template operator()<kDim, kRows, kSumProbabilities>(launch, p);
      }
    };
    switch (plan.dim) {
      case 64: with_dim.template operator()<64>(); break;
      case 96: with_dim.template operator()<96>(); break;
      case 128: with_dim.template operator()<128>(); break;
      default: with_dim.template operator()<256>();
    }
    choose(plan.choose, p);
  }
}

}  // namespace sparse_attn
