// What the plans of hip_select and hip_prune_select share.
#pragma once
#include "hip_cuda_params.h"
#include "plan.h"

namespace sparse_attn {

struct HipPlan {
  LaunchPlan launch;
  int64_t dim;  // that the kernel is compiled for
};

// The launch of a block of threads per list, whose nodes or candidates take `list_bytes`. `rows` of
// queries become as many as shared memory has room for, at least `least`.
static inline HipPlan plan_hip(const HipParams& p, int64_t list_bytes, int64_t least, int64_t& rows,
                               const DeviceLimits& limits) {
  HipPlan plan;
  plan.dim = p.D <= 64 ? 64 : p.D <= 128 ? 128 : 256;
  const int64_t lists = p.B * p.H * p.Mq, row_bytes = 2 * plan.dim;
  // few lists, as in decoding: more warps each
  int64_t warps = (plan.dim == 256 ? 2 : 4) * (lists < 2 * limits.processors ? 2 : 1);
  const auto bytes = [&] {
    return (rows + warps * kHipTiles * kHipTileKeys) * row_bytes + 4 * rows + kHipTopKBytes +
           list_bytes;
  };
  while (bytes() > limits.shared_bytes && rows > least) rows = rows / 32 * 16;
  while (bytes() > limits.shared_bytes && warps > 1) warps /= 2;
  plan.launch.grid[0] = lists, plan.launch.block[0] = 32 * warps;
  plan.launch.shared_bytes = bytes();
  return plan;
}

// Rows, a multiple of 16 up to `most`, that `heads` heads sample from a block of queries.
static inline int64_t hip_rows(const HipParams& p, int64_t heads, int64_t stride, int64_t most) {
  const int64_t rows = round_up(heads * ceil_div(p.q_block < p.Tq ? p.q_block : p.Tq, stride), 16);
  return rows < most ? rows : most;
}

}  // namespace sparse_attn
