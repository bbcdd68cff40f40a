// How sale_threshold is launched.
#pragma once
#include "block_sparse_attention_tile.h"
#include "plan.h"
#include "sale_threshold_params.h"

namespace sparse_attn {

struct SaleThresholdPlan {
  LaunchPlan launch;
  int64_t dim;  // the kernel is compiled for it
};

static inline SaleThresholdPlan plan_sale_threshold(SaleThresholdCudaParams& p) {
  SaleThresholdPlan plan;
  plan.dim = p.D <= 64 ? 64 : p.D <= 96 ? 96 : p.D <= 128 ? 128 : 256;
  const AttentionTile tile{static_cast<int>(plan.dim), kBarRows};
  p.parts = ceil_div(p.q_block, kBarRows);
  plan.launch.grid[0] = p.B * p.Hq * p.Mq * p.parts;
  plan.launch.block[0] = tile.threads();
  plan.launch.shared_bytes =
      tile.query_bytes() + 2 * tile.slot_bytes() + tile.token_bytes() + kBarRows * 4;
  return plan;
}

// Calls `f.operator()<kDim>()` with the plan's.
template <class F>
void with_threshold_dim(const SaleThresholdPlan& plan, const F& f) {
  switch (plan.dim) {
    case 64: return f.template operator()<64>();
    case 96: return f.template operator()<96>();
    case 128: return f.template operator()<128>();
    default: return f.template operator()<256>();
  }
}

}  // namespace sparse_attn
