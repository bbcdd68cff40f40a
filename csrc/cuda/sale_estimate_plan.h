// How sale_estimate is launched, and the scratch memory that it needs.
#pragma once
#include "plan.h"
#include "sale_estimate_params.h"

namespace sparse_attn {

struct SaleEstimatePlan {
  int64_t words;      // of codes that a lane reads of a row: the kernel is compiled for it
  int64_t key_tiles;  // of eight keys in a block, the same
  LaunchPlan prepare, invert, pad, estimate, list;  // nothing to pad: no blocks

  bool pads() const { return pad.grid[0] > 0; }
};

// Completes the sizes in p.
static inline void size_sale_estimate(SaleEstimateCudaParams& p, const DeviceLimits& limits) {
  p.row_bytes = ceil_div(p.D, 32) * 16;
  p.units = ceil_div(p.Tq, kUnitRows) * (p.Hq / p.Hkv);
  p.mask_rows = ceil_div(p.Tq, p.q_block < kUnitRows ? p.q_block : kUnitRows);
  p.words = ceil_div(p.Nk, 32);
  const int64_t tiles = p.B * p.Hkv * ceil_div(p.units, kEstimateThreads / 32);
  const int64_t wanted = ceil_div(4 * limits.processors, tiles);
  p.splits = wanted < p.words ? wanted : p.words;
}

static inline SaleEstimatePlan plan_sale_estimate(const SaleEstimateCudaParams& p) {
  const auto launch = [](int64_t blocks, int64_t threads, int64_t shared_bytes) {
    LaunchPlan plan;
    plan.grid[0] = blocks, plan.block[0] = threads, plan.shared_bytes = shared_bytes;
    return plan;
  };
  SaleEstimatePlan plan;
  plan.words = p.D <= 64 ? 2 : p.D <= 128 ? 4 : 8;
  plan.key_tiles = p.kv_block / 8;
  const int64_t warps = kEstimateThreads / 32, blocks = kStageKeys / p.kv_block;
  const int64_t records = warps * blocks * (p.kv_block + kRecordExtra) * 4;
  const int64_t stage = kStageKeys * plan.words * 16 + records;
  plan.prepare = launch(p.B * p.Hq * ceil_div(p.Nk * p.kv_block, kPrepareThreads), kPrepareThreads,
                        kPrepareThreads / 16 * 4);
  plan.invert = launch(ceil_div(p.B * p.Hq * ceil_div(p.Tq, 16) * 8, kPrepareThreads),
                       kPrepareThreads, 0);
  const int64_t padded = p.D % 32 == 0 ? 0 : p.B * p.Hkv * p.Tk * p.row_bytes;
  plan.pad = launch(ceil_div(padded, kPrepareThreads), kPrepareThreads, 0);
  plan.estimate = launch(p.B * p.Hkv * ceil_div(p.units, warps) * p.splits, kEstimateThreads,
                         2 * stage + warps * kUnitBytes);
  plan.list = launch(p.B * p.Hq * p.Mq, kListThreads, kListThreads / 32 * 4);
  return plan;
}

// Calls buffer(name, pointer, number of elements) for each part of the scratch memory.
template <class Buffer>
void each_sale_estimate_buffer(SaleEstimateCudaParams& p, const SaleEstimatePlan& plan,
                               Buffer buffer) {
  buffer("records", p.records, p.B * p.Hq * p.Nk * (p.kv_block + kRecordExtra));
  buffer("inverse", p.inverse, p.B * p.Hq * ceil_div(p.Tq, 16) * 8);
  if (plan.pads()) buffer("padded", p.padded, p.B * p.Hkv * p.Tk * p.row_bytes);
  buffer("mask", p.mask, p.B * p.Hq * p.mask_rows * p.words);
}

// Gives each buffer its place in one piece of memory; returns the bytes of that. Without memory
// nothing but the size comes of it.
static inline int64_t place_sale_estimate_buffers(SaleEstimateCudaParams& p,
                                                  const SaleEstimatePlan& plan, char* memory) {
  int64_t bytes = 0;
  each_sale_estimate_buffer(p, plan, [&](const char*, auto*& pointer, int64_t n) {
    if (memory != nullptr) pointer = reinterpret_cast<decltype(pointer + 0)>(memory + bytes);
    bytes = round_up(bytes + n * static_cast<int64_t>(sizeof(*pointer)), 256);
  });
  return bytes;
}

// Calls `f.operator()<kWords, kKeyTiles>()` with those of the plan.
template <class F>
void with_sale_codes(const SaleEstimatePlan& plan, const F& f) {
  const auto with_block = [&]<int kWords>() {
    switch (plan.key_tiles) {
      case 2: return f.template operator()<kWords, 2>();
      case 4: return f.template operator()<kWords, 4>();
      default: return f.template operator()<kWords, 8>();
    }
  };
  switch (plan.words) {
    case 2: return with_block.template operator()<2>();
    case 4: return with_block.template operator()<4>();
    default: return with_block.template operator()<8>();
  }
}

}  // namespace sparse_attn
