// What the kernels of sale_quantize and the plan of their launches share.
#pragma once
#include "../common/params.h"

namespace sparse_attn {

constexpr int kCodeThreads = 256;
constexpr int kCodeTokens = 64;  // of one head that a block of threads encodes: whole groups
constexpr int kSumThreads = 128;
constexpr int kChunkTokens = 512;  // summed by one block of threads

// Heads are those of x, B * H of them. Rows of x begin at multiples of 16 bytes.
struct SaleQuantizeCudaParams : SaleQuantizeParams {
  // scratch
  float* partial;  // [heads, chunks, D] sums of tokens
  float* floor;    // [heads] the least that a group's largest value counts as
  int64_t chunks;
};

}  // namespace sparse_attn
