// What the kernels of hip_select and hip_prune_select and the plans of their launches share.
#pragma once
#include "../common/params.h"

namespace sparse_attn {

constexpr int kHipTileKeys = 16;     // keys that a warp multiplies at once
constexpr int kHipStages = 3;        // tiles of keys that a warp has under way
constexpr int kHipMostWarps = 8;
constexpr int kHipMostKept = 1024;   // nodes of a tree, chunks of a stage
constexpr int kHipMostStages = 8;
constexpr int kHipScanned = 8;       // chunks of at most so many keys are scored by all of them
constexpr int kHipTopKBytes = 1168;  // TopKShared

// Lists are those of `merged` query heads each; B * lists * Mq of them.
struct HipCudaParams {
  const void* query;           // [B, Hq, Tq, D]
  const void* key;             // [B, Hkv, Tk, D], or pages [num_pages, Hkv, page_size, D]
  const int32_t* block_table;  // [B, max_pages] or null
  const int32_t* kv_lengths;   // [B] or null
  int32_t* indices;            // [B, Hq / merged, Mq, places]
  int32_t* counts;             // [B, Hq / merged, Mq]
  int64_t query_stride[3], key_stride[3];  // batch or page, head, token
  int64_t table_stride, lengths_stride;
  int64_t B, Hq, Hkv, Tq, Tk, D;  // Tk: of a sequence in pages, the most that it may have
  int64_t page_size;              // 0 without pages
  int64_t merged, Mq, places, q_block, sink, window;
  int64_t rows;  // of queries that shared memory holds
  float sign;    // of the scale
  int32_t causal, centre;
  DType dtype;
};

struct HipSelectCudaParams : HipCudaParams {
  int64_t kv_block, q_stride, samples, key_stride_in_block;
  int64_t keep, nodes;  // blocks to keep; 0 nodes where no list is longer than that
  int64_t log2_branch;
};

struct HipPruneCudaParams : HipCudaParams {
  int64_t stages, room;  // places for candidates
  int64_t chunks[kHipMostStages], keeps[kHipMostStages], q_strides[kHipMostStages];
};

}  // namespace sparse_attn
