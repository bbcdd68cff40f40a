// What the host decides before a launch: no torch, no CUDA.
#pragma once
#include "../common/params.h"

namespace sparse_attn {

// All that a plan may depend on beside the parameters.
struct DeviceLimits {
  int64_t processors;    // multiprocessors
  int64_t shared_bytes;  // that a block can have
};

struct LaunchPlan {
  int64_t grid[3] = {1, 1, 1};
  int64_t block[3] = {1, 1, 1};
  int64_t shared_bytes = 0;
};

static inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace sparse_attn
