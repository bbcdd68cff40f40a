// What the kernels of hip_select and hip_prune_select and the plans of their launches share.
#pragma once
#include "../common/hip_params.h"

namespace sparse_attn {

constexpr int kHipTileKeys = 16;     // keys that a warp multiplies at once
constexpr int kHipTiles = 3;         // tiles of keys that a warp has under way
constexpr int kHipMostWarps = 8;
constexpr int kHipScanned = 8;       // chunks of at most so many keys are scored by all of them
constexpr int kHipTopKBytes = 1168;  // TopKShared

struct HipSelectCudaParams : HipSelectParams {
  int64_t rows;     // of queries that shared memory holds
  int64_t nodes;    // of the tree, 0 where every block is kept
  int64_t samples;  // keys of a block
};

struct HipPruneCudaParams : HipPruneParams {
  int64_t rows;  // of queries that shared memory holds: all that a head samples
  int64_t room;  // places for candidates, more than any stage keeps
};

}  // namespace sparse_attn
