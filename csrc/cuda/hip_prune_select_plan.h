// How hip_prune_select is launched.
#pragma once
#include "hip_plan.h"

namespace sparse_attn {

// Completes p.
static inline HipPlan plan_hip_prune_select(HipPruneCudaParams& p, const DeviceLimits& limits) {
  int64_t most = 128;
  p.rows = 16;
  for (int64_t i = 0; i < p.stages; ++i) {
    const int64_t there = ceil_div(p.Tk, p.chunk[i]);
    if (p.keep[i] > there) p.keep[i] = there;
    const int64_t rows = hip_rows(p, 1, p.q_stride[i], 128);
    if (p.rows < rows) p.rows = rows;
    if (most < p.keep[i]) most = p.keep[i];
  }
  p.room = 2 * most;
  return plan_hip(p, 4 * (2 * p.room + most), p.rows, p.rows, limits);
}

}  // namespace sparse_attn
