// What the driver (squeezed_lookup.cpp) and the kernels of each instruction set share.
#pragma once
#include <cstdint>

#include "../common/params.h"
#include "block_sparse_attention.h"

namespace sparse_attn {

constexpr int kLookupRowsMax = 8;

// Rows of the query against clusters [begin, end) of one head of a level.
struct ScoreTask {
  const char* rows[kLookupRowsMax];
  int n_rows;
  const char* centroids;  // of the head
  int64_t stride;         // bytes from one centroid to the next
  int64_t begin, end;
  const uint8_t* needed;  // per group of 32 clusters whether to score it at all; null: all
};

struct LookupKernel {
  int rows;  // at most, of a task
  int64_t (*scratch_bytes)(const SqueezedLookupParams&);
  // logits[r][j] = scale * row r . centroid j; groups that are not needed are left alone
  void (*score)(const SqueezedLookupParams&, const ScoreTask&, void* scratch, float* const* logits);
  // log sum_j exp(logits[j] + weights[j]); logits of weight -inf become -inf, NaN stays NaN
  float (*log_sum)(float* logits, const float* weights, int64_t n);
  // total[j] += exp(logits[j] - log_sum)
  void (*add_shares)(const float* logits, int64_t n, float log_sum, float* total);
};

extern const LookupKernel kLookupAvx512Bf16;  // bf16 only
extern const LookupKernel kLookupAvx512, kLookupAvx2, kLookupPortable;

}  // namespace sparse_attn
