// Plain parameter structs shared by the bindings and the kernels: raw pointers, no torch.
#pragma once
#ifdef __CUDACC_RTC__  // NVRTC has no standard library
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

namespace sparse_attn {

enum class DType : int { f32, f16, bf16 };

#ifndef __CUDACC_RTC__  // NVRTC has no functions of the host
// static: each unit has its own copy, compiled for its own instruction set
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
#endif

// Strides are in elements; the last dimension of every tensor is contiguous.
struct BlockSparseAttentionParams {
  const void* query;       // [B, Hq, Tq, D]
  const void* key;         // [B, Hkv, Tk, D]
  const void* value;       // [B, Hkv, Tk, Dv]
  const int32_t* indices;  // [B, Hi, Mq, K]  Hi in {1, Hkv, Hq}; ascending, unique
  const int32_t* counts;   // [B, Hi, Mq]
  void* out;               // [B, Hq, Tq, Dv]
  float* lse;              // [B, Hq, Tq] contiguous
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // batch, head, token
  int64_t indices_stride[3];  // batch, head, query block
  int64_t counts_stride[3];
  int64_t B, Hq, Hkv, Hi, Tq, Tk, D, Dv, Mq, K;
  int64_t q_block, kv_block;
  int64_t sink, window;
  float scale;
  bool causal;
  DType dtype;
  // Caches. With a block table key and value are [pages, Hkv, 2^page_bits, D], stride 0 is that of
  // pages, and token t lies in page block_table[t >> page_bits]; Tk is what a sequence has room for.
  const int32_t* block_table;  // [B, Tk >> page_bits], or null
  const int32_t* kv_lengths;   // [B] how many of the Tk keys there are, or null: all
  int64_t block_table_stride, pages, page_bits;
};

struct MergeAttentionStatesParams {
  const void *out_a, *out_b;    // [B, H, T, Dv]
  const float *lse_a, *lse_b;   // [B, H, T]
  void* out;                    // [B, H, T, Dv] contiguous
  float* lse;                   // [B, H, T] contiguous
  int64_t out_a_stride[3], out_b_stride[3], lse_a_stride[3], lse_b_stride[3];  // batch, head, token
  int64_t B, H, T, Dv;
  DType dtype;
};

// One level of clusters of a context; C is B, or 1 with a batch stride of 0.
struct SqueezedLevel {
  const void* centroids;      // [C, Hkv, K, D]
  const float* log_counts;    // [C, Hkv, K]  -inf: an empty cluster
  const int32_t* offsets;     // [C, Hkv, K + 1]  what each cluster holds: tokens, or children
  const float* threshold;     // one number
  int64_t centroids_stride[3];   // batch, head, cluster
  int64_t log_counts_stride[2], offsets_stride[2];  // batch, head; what follows is contiguous
  int64_t K;
};

struct SqueezedLookupParams {
  const void* query;  // [B, Hq, Tq, D]
  SqueezedLevel fine, coarse;  // coarse.K = 0: one level
  int32_t *starts, *sums;      // [B, Hd, runs] contiguous
  int32_t *counts, *tokens;    // [B, Hd] contiguous
  int64_t query_stride[3];     // batch, head, token
  int64_t B, Hq, Hkv, Hd, Tq, D;  // Hd: heads that decide, Hq or Hkv
  int64_t runs;                // capacity of starts and sums, (K + 1) / 2
  float scale;
  DType dtype;
};

struct SqueezedAttendParams {
  const void *query;                   // [B, Hq, Tq, D]
  const void *key, *value;             // [C, Hkv, Tk, D], [C, Hkv, Tk, Dv]; batch stride 0 if C = 1
  const void *tail_key, *tail_value;   // [B, Hkv, N, D], [B, Hkv, N, Dv]
  const int32_t *starts, *sums;        // [B, Hd, runs]
  const int32_t* counts;               // [B, Hd]
  const int32_t* tail_lengths;         // [B] contiguous, or null: all N
  void* out;                           // [B, Hq, Tq, Dv] contiguous
  float* lse;                          // [B, Hq, Tq] contiguous
  int64_t query_stride[3], key_stride[3], value_stride[3];    // batch, head, token
  int64_t tail_key_stride[3], tail_value_stride[3];
  int64_t starts_stride[2], sums_stride[2], counts_stride[2];  // batch, head
  int64_t B, Hq, Hkv, Hd, Tq, Tk, N, D, Dv;
  int64_t runs;  // capacity of starts and sums
  float scale;
  DType dtype;
};

struct FlexPrefillParams {
  const void* query;  // [B, Hq, Tq, D]
  const void* key;    // [B, Hkv, Tk, D]
  int64_t query_stride[3], key_stride[3];
  int64_t B, Hq, Hkv, Tq, Tk, D;
  int64_t block;  // tokens per block
  int64_t probe;  // probe rows: the last queries, at most a block
  float scale;
  DType dtype;
};

// Where the step of a token is: sparse_attn/ops/_sale.py.
enum class SaleGroup : int { query, key };

struct SaleQuantizeParams {
  const void* x;       // [B, H, T, D]
  uint8_t* packed;     // [B, H, T, D / 2] contiguous
  float* step;         // [B, H, groups] contiguous
  float* center;       // [B, H, D] contiguous; holds the mean if one was given
  int64_t x_stride[3];  // batch, head, token
  int64_t B, H, T, D, groups;
  int64_t block;
  SaleGroup group;
  bool mean_given;
  DType dtype;
};

struct SaleEstimateParams {
  const uint8_t* query;     // [B, Hq, Tq, D / 2]
  const uint8_t* key;       // [B, Hkv, Tk, D / 2]
  const float* query_step;  // [B, Hq, 8 * ceil(Tq / 16)] contiguous, as all below
  const float* key_step;    // [B, Hkv, 4 * Nk]
  const float* key_bias;    // [B, Hq, Tk]
  const float* theta;       // [B, Hq, Tq]
  int32_t* indices;         // [B, Hq, Mq, Nk]
  int32_t* counts;          // [B, Hq, Mq]
  int64_t query_stride[3], key_stride[3];  // batch, head, token; in bytes
  int64_t B, Hq, Hkv, Tq, Tk, D, Mq, Nk;
  int64_t q_block, kv_block;
  int64_t local_blocks, sink_blocks;
};

}  // namespace sparse_attn
