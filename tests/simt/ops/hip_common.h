// From Python's arguments to what hip_select and hip_prune_select share.
#pragma once
#include "common/hip_params.h"
#include "simt/ops/common.h"

namespace sparse_attn {

// All but what only one of the two has; p.kv_block is set.
inline void set_hip_params(const simt::Arguments& a, HipParams& p) {
  p.query = a.pointer<void>("query"), p.key = a.pointer<void>("key");
  strides(a.tensor("query"), p.query_stride), strides(a.tensor("key"), p.key_stride);
  const auto &query = a.tensor("query").sizes, &key = a.tensor("key").sizes;
  p.B = query[0], p.Hq = query[1], p.Tq = query[2], p.D = query[3];
  p.Hkv = key[1], p.Tk = key[2];
  if (a.tensors.count("block_table") != 0) {
    const simt::Tensor& table = a.tensor("block_table");
    p.block_table = a.pointer<int32_t>("block_table"), p.block_table_stride = table.strides[0];
    p.pages = key[0];
    while (key[2] >> p.page_bits > 1) ++p.page_bits;
    p.Tk *= table.sizes[1];
  }
  if (a.tensors.count("kv_lengths") != 0) p.kv_lengths = a.pointer<int32_t>("kv_lengths");
  const auto& index = a.tensor("indices").sizes;
  p.indices = a.pointer<int32_t>("indices"), p.counts = a.pointer<int32_t>("counts");
  p.H = index[1], p.Mq = index[2], p.K = index[3];
  p.q_block = static_cast<int64_t>(a.number("q_block"));
  p.sink = static_cast<int64_t>(a.number("sink"));
  p.window = static_cast<int64_t>(a.number("window"));
  const double scale = a.number("scale", 1);
  p.sign = scale > 0 ? 1.f : scale < 0 ? -1.f : 0.f;
  p.causal = a.number("causal") != 0, p.centre = a.number("representative=centre", 0) != 0;
  p.dtype = dtype(a);
}

// Runs `kernel<T, kDim>` as planned.
#define SIMT_LAUNCH_HIP(kernel, a, plan, p)         \
  if (p.dtype == DType::f16)                        \
    SIMT_LAUNCH_HIP_AS(kernel, __half, a, plan, p)  \
  else                                              \
    SIMT_LAUNCH_HIP_AS(kernel, __nv_bfloat16, a, plan, p)
#define SIMT_LAUNCH_HIP_AS(kernel, T, a, plan, p)                          \
  switch (plan.dim) {                                                      \
    case 64: launch<kernel<T, 64>>(a, plan.launch, p); break;              \
    case 128: launch<kernel<T, 128>>(a, plan.launch, p); break;            \
    default: launch<kernel<T, 256>>(a, plan.launch, p);                    \
  }

}  // namespace sparse_attn
