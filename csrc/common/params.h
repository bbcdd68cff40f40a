// Plain parameter structs shared by the bindings and the kernels: raw pointers, no torch.
#pragma once
#include <cstdint>

namespace sparse_attn {

// static: each unit has its own copy, compiled for its own instruction set
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

enum class DType : int { f32, f16, bf16 };

static inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

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

}  // namespace sparse_attn
