// How merge_attention_states is launched.
#pragma once
#include "plan.h"

namespace sparse_attn {

struct MergeAttentionStatesPlan {
  LaunchPlan launch;
  int64_t vector;  // elements that a thread loads at once
};

inline MergeAttentionStatesPlan plan_merge_attention_states(const MergeAttentionStatesParams& p) {
  constexpr int64_t kThreads = 128, kWarp = 32, kVector = 8;
  const auto aligned = [&](const void* data, const int64_t (&stride)[3]) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[0] % kVector == 0 &&
           stride[1] % kVector == 0 && stride[2] % kVector == 0;
  };
  MergeAttentionStatesPlan plan;
  const bool vectors = p.Dv % kVector == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
                       aligned(p.out_a, p.out_a_stride) && aligned(p.out_b, p.out_b_stride);
  plan.vector = vectors ? kVector : 1;
  int64_t lanes = 1;  // threads per row
  while (lanes < kWarp && lanes * plan.vector < p.Dv) lanes *= 2;
  plan.launch.block[0] = lanes, plan.launch.block[1] = kThreads / lanes;
  plan.launch.grid[0] = ceil_div(p.B * p.H * p.T, plan.launch.block[1]);
  return plan;
}

}  // namespace sparse_attn
