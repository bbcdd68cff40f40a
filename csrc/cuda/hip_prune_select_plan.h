// How hip_prune_select is launched.
#pragma once
#include "hip_plan.h"

namespace sparse_attn {

struct HipPrunePlan {
  LaunchPlan launch;
  int64_t dim;
};

// Completes p, which has the shapes and the options.
static inline HipPrunePlan plan_hip_prune_select(HipPruneCudaParams& p,
                                                 const DeviceLimits& limits) {
  const int64_t blocks = ceil_div(p.Tk, p.chunks[p.stages - 1]);
  p.Mq = ceil_div(p.Tq, p.q_block);
  p.places = p.keeps[p.stages - 1] < blocks ? p.keeps[p.stages - 1] : blocks;
  int64_t most = 0, rows = 1;
  for (int64_t i = 0; i < p.stages; ++i) {
    if (p.keeps[i] > most) most = p.keeps[i];
    const int64_t sampled = ceil_div(p.q_block < p.Tq ? p.q_block : p.Tq, p.q_strides[i]);
    if (sampled > rows) rows = sampled;
  }
  p.room = 2 * (most > 128 ? most : 128);
  HipPrunePlan plan;
  plan.dim = plan_hip(p, p.B * (p.Hq / p.merged) * p.Mq, rows, 4 * (2 * p.room + most), true,
                      limits, plan.launch);
  return plan;
}

}  // namespace sparse_attn
