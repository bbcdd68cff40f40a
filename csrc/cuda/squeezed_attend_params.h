// What the plan of squeezed_attend on the host and its kernel agree on.
#pragma once
#include "block_sparse_attention_tile.h"

namespace sparse_attn {

struct SqueezedAttendCall : SqueezedAttendParams {
  int64_t out_stride[3];  // batch, head, token
};

// Keys are dealt out in units of so many: taking fewer of a tile of rows does not pay for joining
// what several blocks have found.
constexpr int kUnitKeys = 128;

struct SqueezedAttendCudaParams {
  SqueezedAttendCall call;
  int32_t queries, heads;  // of a tile of rows: their product is at most those of AttentionTile
  int32_t query_tiles, head_tiles;  // of a list of runs
  int64_t items;                    // tiles of rows: B * Hd * head_tiles * query_tiles
  // What blocks found of tiles of rows that they share: of each block one that others began and one
  // that others finish. `done`: how many blocks of a tile of rows are done, zero at the start.
  int32_t* done;       // [items]
  float* part_values;  // [blocks, 2, heads * queries, Dv]
  float* part_stats;   // [blocks, 2, heads * queries, 2]
};

}  // namespace sparse_attn
