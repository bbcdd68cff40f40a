// How sale_quantize is launched, and the scratch memory that it needs.
#pragma once
#include "plan.h"
#include "sale_quantize_params.h"

namespace sparse_attn {

struct SaleQuantizePlan {
  LaunchPlan sum, mean, code;  // a given mean: nothing to sum, no blocks
};

static inline void size_sale_quantize(SaleQuantizeCudaParams& p) {
  p.chunks = p.mean_given ? 0 : ceil_div(p.T, kChunkTokens);
}

static inline SaleQuantizePlan plan_sale_quantize(const SaleQuantizeCudaParams& p) {
  const auto launch = [](int64_t blocks, int64_t threads, int64_t shared_bytes) {
    LaunchPlan plan;
    plan.grid[0] = blocks, plan.block[0] = threads, plan.shared_bytes = shared_bytes;
    return plan;
  };
  const int64_t heads = p.B * p.H;
  SaleQuantizePlan plan;
  plan.sum = launch(p.mean_given ? 0 : heads * p.chunks, kSumThreads, kSumThreads * 8 * 4);
  plan.mean = launch(heads, kSumThreads, 16);
  plan.code = launch(heads * ceil_div(p.T, kCodeTokens), kCodeThreads, kCodeTokens * 8);
  return plan;
}

// Gives the scratch memory to p; returns the bytes of that.
static inline int64_t place_sale_quantize_buffers(SaleQuantizeCudaParams& p, char* memory) {
  const int64_t floors = round_up(p.B * p.H * 4, 16);
  p.floor = reinterpret_cast<float*>(memory);
  p.partial = reinterpret_cast<float*>(memory + floors);
  return floors + p.B * p.H * p.chunks * p.D * 4;
}

}  // namespace sparse_attn
