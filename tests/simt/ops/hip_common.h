// From Python's arguments to what hip_select and hip_prune_select share.
#pragma once
#include "cuda/hip_params.h"
#include "simt/ops/common.h"

namespace sparse_attn {

template <class P>
P hip_params(const simt::Arguments& a, int64_t merged) {
  P p{};
  p.query = a.pointer<void>("query"), p.key = a.pointer<void>("key");
  strides(a.tensor("query"), p.query_stride), strides(a.tensor("key"), p.key_stride);
  const auto &query = a.tensor("query").sizes, &key = a.tensor("key").sizes;
  p.B = query[0], p.Hq = query[1], p.Tq = query[2], p.D = query[3];
  p.Hkv = key[1], p.Tk = key[2];
  if (a.tensors.count("block_table") != 0) {
    const simt::Tensor &table = a.tensor("block_table"), &lengths = a.tensor("kv_lengths");
    p.block_table = a.pointer<int32_t>("block_table"), p.table_stride = table.strides[0];
    p.kv_lengths = a.pointer<int32_t>("kv_lengths"), p.lengths_stride = lengths.strides[0];
    p.page_size = key[2], p.Tk = table.sizes[1] * key[2];
  }
  p.indices = a.pointer<int32_t>("indices"), p.counts = a.pointer<int32_t>("counts");
  p.merged = merged;
  p.q_block = static_cast<int64_t>(a.number("q_block"));
  p.sink = static_cast<int64_t>(a.number("sink"));
  p.window = static_cast<int64_t>(a.number("window"));
  const double scale = a.number("scale", 1);
  p.sign = scale > 0 ? 1.f : scale < 0 ? -1.f : 0.f;
  p.causal = a.number("causal") != 0, p.centre = a.number("representative=centre", 0) != 0;
  p.dtype = dtype(a);
  return p;
}

}  // namespace sparse_attn
