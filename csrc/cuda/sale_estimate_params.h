// What the kernels of sale_estimate and the plan of their launches share.
#pragma once
#include "../common/params.h"

namespace sparse_attn {

constexpr int kEstimateThreads = 128;
constexpr int kUnitRows = 64;    // queries of one head that a warp owns
constexpr int kStageKeys = 128;  // keys that are in shared memory at once, twice
constexpr int kRecordExtra = 8;  // numbers of a record beside one per key
constexpr int kPrepareThreads = 128, kListThreads = 128;
constexpr int kUnitBytes = 640;  // of shared memory, what a warp keeps of its rows

// Rows of `query` begin at multiples of 4 bytes, of `key` of 16.
struct SaleEstimateCudaParams : SaleEstimateParams {
  // scratch
  float* records;    // [B, Hq, Nk, kv_block + kRecordExtra], see sale_prepare_kernel
  float* inverse;    // [B, Hq, 8 ceil(Tq / 16)] one by the steps of queries
  uint8_t* padded;   // [B, Hkv, Tk, row_bytes] the keys, where D / 2 is no multiple of 16
  uint32_t* mask;    // [B, Hq, mask_rows, words] bit i of word w: whether block 32 w + i is kept
  int64_t row_bytes;  // of a key's codes, padded
  int64_t units;      // of a KV head: 64 queries of one query head each
  int64_t splits;     // blocks of threads that share the keys of four units
  int64_t mask_rows, words;
};

}  // namespace sparse_attn
