// What the kernels of squeezed_lookup and the plan of their launches share.
#pragma once
#include "block_sparse_attention_tile.h"

namespace sparse_attn {

constexpr int kLookupRows = 16;  // queries up to which every score is kept
constexpr int kLookupRing = 4;   // tiles of clusters whose weights are held
constexpr int kChooseClustersThreads = 512;
constexpr int kChooseClustersBytes = 512;  // shared memory, without the rows' sums

enum LookupMode : int { kKeepScores, kFindExtents, kSumProbabilities };

// Scratch memory of one level of clusters. `row`: K rounded up to tiles of clusters.
struct SqueezedLookupScratch {
  float* extent;   // [B, Hq, Tq, splits, 2] largest score, sum of 2^(score - largest)
  float* scores;   // [B, Hq, Tq, row], or sums of probabilities [B, Hq, query_tiles, row]
  uint32_t* kept;  // [B, Hd, K / 32] a bit per cluster
  int64_t row;
  int32_t splits;  // blocks that share the clusters of a tile of rows
};

struct SqueezedLookupCudaParams {
  SqueezedLookupParams call;
  SqueezedLookupScratch fine, coarse;
  uint8_t* alive;          // [B, Hd, K] of two levels: whether the parent was kept
  int32_t queries, heads;  // of a tile of rows
  int32_t query_tiles;     // per head
  int32_t head_tiles;      // per KV head
  int32_t rows;            // that a choice is the mean of
  int32_t parts;           // in which their sums come; 0: their scores were kept
  int32_t sets;            // of weights that a tile of rows has on the fine level
  int32_t at_coarse;       // the level that a launch is for
};

// What a block of threads has in shared memory after queries and slots.
struct LookupTail {
  int keys, sets;

  SA_HOST_DEVICE constexpr int tokens_bytes() const { return kLookupRing * keys * 4; }
  SA_HOST_DEVICE constexpr int weights_bytes() const { return tokens_bytes() * sets; }
  SA_HOST_DEVICE constexpr int columns_bytes() const { return 2 * 4 * keys * 4; }  // of two tiles
  SA_HOST_DEVICE constexpr int bytes() const {
    return tokens_bytes() + weights_bytes() + columns_bytes() + 64;
  }
};

}  // namespace sparse_attn
