// What the driver (block_sparse_attention_backward.cpp) and the kernels of each instruction set
// share.
#pragma once
#include "block_sparse_attention.h"

namespace sparse_attn {

// `out` and `lse` of the base are not used: what is needed of them is in `reference` and `delta`.
struct BlockSparseAttentionBackwardParams : BlockSparseAttentionParams {
  const void* grad_out;  // [B, Hq, Tq, Dv]
  int64_t grad_out_stride[3];
  const float* reference;  // [B, Hq, Tq] lse, +inf for a row that saw no key
  const float* delta;      // [B, Hq, Tq] rowsum(grad_out * out) - grad_lse
  void* grad_query;        // [B, Hq, Tq, D] contiguous, as the next two
  void* grad_key;          // [B, Hkv, Tk, D]
  void* grad_value;        // [B, Hkv, Tk, Dv]
};

constexpr int kMaxKeys = 128;  // keys in a tile

// Keys of one KV head, a whole number of KV blocks.
struct KeyTile {
  int64_t batch, kv_head;
  int64_t key, keys;
};

// Queries of one head and one query block that see keys of a tile.
struct QueryRun {
  int32_t head, query, queries;
  bool window;                   // some key is in the window of some query
  uint32_t seen[kMaxKeys / 32];  // keys of the tile that are listed or in the sink
};

// One implementation, for every dtype; buffers handed to it are aligned to 64 bytes.
struct AttentionBackwardKernel {
  int64_t (*scratch_bytes)(const BlockSparseAttentionBackwardParams&);
  void (*query_tile)(const BlockSparseAttentionBackwardParams&, const QueryTile&, const KeyGroup*,
                     int64_t n_groups, void* scratch);
  void (*key_tile)(const BlockSparseAttentionBackwardParams&, const KeyTile&, const QueryRun*,
                   int64_t n_runs, void* scratch);
};

extern const AttentionBackwardKernel kBackwardAvx512, kBackwardAvx2, kBackwardPortable;

}  // namespace sparse_attn
