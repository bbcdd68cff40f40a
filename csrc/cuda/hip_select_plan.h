// How hip_select is launched.
#pragma once
#include "hip_plan.h"

namespace sparse_attn {

// Completes p.
static inline HipPlan plan_hip_select(HipSelectCudaParams& p, const DeviceLimits& limits) {
  p.samples = ceil_div(p.kv_block, p.key_step);
  p.nodes = p.keep < ceil_div(p.Tk, p.kv_block) ? p.keep : 0;
  p.rows = hip_rows(p, p.Hq / p.H, p.q_stride, 128);
  return plan_hip(p, p.nodes * (20 + 6 * p.branch), 16, p.rows, limits);
}

}  // namespace sparse_attn
