// What the plans of hip_select and hip_prune_select share.
#pragma once
#include "hip_params.h"
#include "plan.h"

namespace sparse_attn {

// Sets the rows that shared memory holds, at most `rows`, and the launch of `blocks` blocks whose
// own lists take `list_bytes`. Returns the head dimension that the kernel is compiled for.
static inline int64_t plan_hip(HipCudaParams& p, int64_t blocks, int64_t rows, int64_t list_bytes,
                               bool all_rows, const DeviceLimits& limits, LaunchPlan& launch) {
  const int64_t dim = p.D <= 64 ? 64 : p.D <= 128 ? 128 : 256;
  const int64_t row_bytes = 2 * dim;
  // few blocks, as in decoding: more warps each
  int64_t warps = (dim == 256 ? 2 : 4) * (blocks < 2 * limits.processors ? 2 : 1);
  p.rows = round_up(rows < 128 ? rows : 128, 16);
  const auto bytes = [&] {
    return (p.rows + warps * kHipStages * kHipTileKeys) * row_bytes + 4 * p.rows + kHipTopKBytes +
           list_bytes;
  };
  while (bytes() > limits.shared_bytes && (warps > 1 || (!all_rows && p.rows > 16)))
    if (!all_rows && p.rows > 32)
      p.rows = round_up(p.rows / 2, 16);
    else if (warps > 1)
      warps /= 2;
    else
      p.rows = 16;
  launch.grid[0] = blocks, launch.block[0] = 32 * warps, launch.shared_bytes = bytes();
  return dim;
}

}  // namespace sparse_attn
