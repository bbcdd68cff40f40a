// Parameters of HiP's selections, without torch.
#pragma once
#include "params.h"

namespace sparse_attn {

// Strides are in elements; the last dimension of query and key is contiguous.
struct HipParams {
  const void* query;           // [B, Hq, Tq, D]
  const void* key;             // [B, Hkv, Tk, D], with a table [pages, Hkv, 2^page_bits, D]
  const int32_t* block_table;  // [B, Tk >> page_bits], or null: token t is in page [t >> page_bits]
  const int32_t* kv_lengths;   // [B] how many of the Tk keys there are, or null: all
  int32_t* indices;            // [B, H, Mq, K] contiguous
  int32_t* counts;             // [B, H, Mq] contiguous
  int64_t query_stride[3], key_stride[3];  // batch (pages), head, token
  int64_t block_table_stride, pages, page_bits;
  int64_t B, Hq, Hkv, Tq, Tk, D;
  int64_t H, Mq, K;            // heads that choose for themselves: Hq, Hkv or 1
  int64_t q_block, kv_block, sink, window;
  float sign;                  // of the scale: 1, -1 or 0
  bool causal, centre;
  DType dtype;
};

struct HipSelectParams : HipParams {
  int64_t keep;  // blocks, at most as many as there are
  int64_t q_stride, key_step, branch;
};

constexpr int kHipStages = 8;  // at most

struct HipPruneParams : HipParams {
  int64_t stages;
  int64_t chunk[kHipStages], keep[kHipStages], q_stride[kHipStages];  // keep in chunks
};

}  // namespace sparse_attn
