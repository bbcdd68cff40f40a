// What the drivers of HiP's selections and the kernels of each instruction set share.
#pragma once
#include <cstdint>

#include "../common/hip_params.h"

namespace sparse_attn {

// The keys of one KV head of one sequence, wherever they lie.
struct HipKeys {
  const char* base;      // key 0, or row 0 of page 0
  int64_t row_bytes;     // from one key to the next
  int64_t page_bytes;    // from one page to the next
  const int32_t* pages;  // the sequence's row of the table, or null
  int page_bits;
  int32_t count;
};

// static: each unit has its own copy, compiled for its own instruction set
static inline const char* row_of(const HipKeys& keys, int32_t token) {
  if (token >= keys.count) token = keys.count - 1;  // what is not there is masked by every limit
  if (keys.pages == nullptr) return keys.base + token * keys.row_bytes;
  return keys.base + keys.pages[token >> keys.page_bits] * keys.page_bytes +
         (token & ((1 << keys.page_bits) - 1)) * keys.row_bytes;
}

// The queries that vote.
struct HipVoters {
  const char* const* row;
  const int32_t* limit;   // the last key that counts for each; padded with the last one's
  int64_t count;
  int32_t lowest_limit;   // up to here keys count for all
};

constexpr int kHipLanes = 32;  // to a multiple of which `limit` is padded

struct HipScoreKernel {
  // of voters at the most, and D
  int64_t (*scratch_bytes)(const HipParams&, int64_t voters);
  // brings the voters into the order in which `score` reads them
  void (*pack)(const HipParams&, const HipVoters&, void* scratch);
  // scores[i] of each of n tokens: the best q . k of the voters for which it counts; NaN does not
  void (*score)(const HipParams&, const HipVoters&, const HipKeys&, const int32_t* tokens,
                int64_t n, float* scores, void* scratch);
  // places of the `keep` < n largest, ascending; of equal ones the first. `ranks` is overwritten.
  void (*keep_best)(const float* values, int64_t n, int64_t keep, int32_t* ranks, int32_t* places);
};

// bf16 with an even head_dim
extern const HipScoreKernel kHipScoreAvx512Bf16;
// every dtype
extern const HipScoreKernel kHipScoreAvx512, kHipScoreAvx2, kHipScorePortable;

}  // namespace sparse_attn
