// What the kernel of sale_threshold and the plan of its launch share.
#pragma once
#include "../common/params.h"

namespace sparse_attn {

constexpr int kBarRows = 64;  // queries of a block of threads, at most

// Rows of query and key begin at multiples of 16 bytes.
struct SaleThresholdCudaParams {
  const void* query;       // [B, Hq, Tq, D]
  const void* key;         // [B, Hkv, Tk, D]
  const float* key_mean;   // [B, Hkv, D] contiguous, as all below
  const float* threshold;  // [Hq]
  float* theta;            // [B, Hq, Tq]
  int64_t query_stride[3], key_stride[3];  // batch, head, token
  int64_t B, Hq, Hkv, Tq, Tk, D, Mq;
  int64_t q_block, kv_block;
  int64_t local_blocks, sink_blocks;
  int64_t parts;  // blocks of threads for a query block
  float scale;    // 0 or more
  DType dtype;
};

}  // namespace sparse_attn
