// How hip_select is launched.
#pragma once
#include "hip_plan.h"

namespace sparse_attn {

struct HipSelectPlan {
  LaunchPlan launch;
  int64_t dim;
};

// Completes p, which has the shapes and the options.
static inline HipSelectPlan plan_hip_select(HipSelectCudaParams& p, const DeviceLimits& limits) {
  p.Mq = ceil_div(p.Tq, p.q_block);
  p.samples = ceil_div(p.kv_block, p.key_stride_in_block);
  const int64_t blocks = ceil_div(p.Tk, p.kv_block);
  p.places = p.keep < blocks ? p.keep : blocks;
  p.nodes = p.keep < blocks ? p.keep : 0;
  const int64_t list_bytes = p.nodes * (20 + (6 << p.log2_branch));
  HipSelectPlan plan;
  plan.dim = plan_hip(p, p.B * (p.Hq / p.merged) * p.Mq,
                      p.merged * ceil_div(p.q_block < p.Tq ? p.q_block : p.Tq, p.q_stride),
                      list_bytes, false, limits, plan.launch);
  return plan;
}

}  // namespace sparse_attn
