// What the kernels of flex_prefill_select and the plan of their launches share.
#pragma once
#include "../common/params.h"

namespace sparse_attn {

constexpr int kProbeRows = 128;     // rows of the probe, the real ones last
constexpr int kTileKeys = 64;       // keys that a block of threads scores at once
constexpr int kSliceDims = 64;      // of the head dimension that one stage of the pipeline holds
constexpr int kProbeStages = 3;
constexpr int kProbeThreads = 128;  // four warps: two halves of the rows, two of the keys
constexpr int kMeanThreads = 128;
constexpr int kSumThreads = 128, kSumBlocks = 16;       // blocks of keys per block of threads
constexpr int kChooseThreads = 512;
constexpr int kScoreThreads = 128, kScoreRows = 32, kScoreColumns = 64, kScoreDims = 32;
constexpr int kListThreads = 128;
// shared memory, without slices of the probe and keys
constexpr int kProfileSharedBytes = 5120, kChooseSharedBytes = 2192, kListSharedBytes = 2096;

// Where a head's choice stands for all its rows, and where not.
enum HeadState : int { kVerticalSlash = 0, kQueryAware = 1, kEveryBlock = 2 };

// Heads are those of query, B * Hq of them. Distances are stored by the key that the last query
// sees at them: place u is distance Tk - 1 - u. Sums per distance come in two parts: those of the
// chunk of keys in which u lies, and what the chunk before adds to its first kProbeRows places.
struct FlexPrefillCudaParams : FlexPrefillParams {
  int32_t* indices;  // [heads, Mq, Nk]; of query-aware heads their scores (float32) before
  int32_t* counts;   // [heads, Mq]
  int32_t* pattern;  // [heads]
  // scratch
  float* extent;         // [heads, chunks, kProbeRows, 2] largest score, sum of 2^(score - largest)
  int32_t* finite;       // [heads]
  float* vertical;       // [heads, Tk] mass per key
  float* slash;          // [heads, Tk] mass per distance
  float* slash_spill;    // [heads, chunks, kProbeRows]
  float* columns;        // [heads, Tk] of the mass that is not free, what columns explain
  float* diagonals;      // [heads, Tk] and what diagonals do
  float* diagonal_spill; // [heads, chunks, kProbeRows]
  float* mean_key;       // [B, Hkv, Nk, D]
  float* mean_query;     // [heads, Mq, D] of query-aware heads
  float* mass;           // [heads, Nk]
  float* ranked;         // [heads, 2, Nk] columns and buckets of distances
  float* estimate;       // [heads, Nk] scores of the probe's mean against the means of the keys
  uint8_t* flags;        // [heads, Nk]
  int32_t* state;        // [heads] HeadState
  int64_t Mq, Nk;        // blocks of queries, of keys
  int64_t chunks, chunk_tiles;  // of the probe kernels
  int64_t low, high;     // least and most columns, and buckets
  float log2_scale;      // scale / ln 2
  float gamma, tau;
};

}  // namespace sparse_attn
