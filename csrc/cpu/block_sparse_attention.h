// What the driver (block_sparse_attention.cpp) and the kernels of each instruction set share.
#pragma once
#include <cstdint>

#include "../common/params.h"

namespace sparse_attn {

constexpr int kGroupKeys = 32;  // keys in a group
constexpr int kMaxRows = 128;   // query rows in a tile

// Up to 32 keys that a tile attends to. Slots that no row may see have neither bit set.
struct KeyGroup {
  const int32_t* tokens;  // key position per slot (unused slots repeat a valid one), or null:
  int32_t first;          // slot s holds key first + s, a multiple of 32 with first + 31 < Tk
  uint32_t everyone;      // slots that all rows may see, causality apart
  uint32_t windowed;      // slots seen by the rows whose window reaches them
};

// Query rows that share one index row and one KV head.
// Row r is query (query + r % queries) of head (head + r / queries).
struct QueryTile {
  int64_t batch, kv_head;
  int64_t head, heads;
  int64_t query, queries;

  int64_t rows() const { return heads * queries; }
};

// One implementation, called with the parameters of one sequence (Sequences in
// block_sparse_attention_call.h): Tk is how many keys it has, block_table its row. Buffers handed
// to it are aligned to 64 bytes; tensor data need not be.
struct AttentionKernel {
  // bytes of the per-call copy of the values of one (batch, KV head); 0: reads them in place
  int64_t (*packed_bytes)(const BlockSparseAttentionParams&);
  // packs the values of key groups [group_begin, group_end)
  void (*pack)(const BlockSparseAttentionParams&, int64_t batch, int64_t kv_head,
               int64_t group_begin, int64_t group_end, void* packed);
  int64_t (*scratch_bytes)(const BlockSparseAttentionParams&);
  // `packed` is null where too few rows would repay the packing.
  // `partial` null: writes out and lse. Otherwise writes per row Dv unnormalised floats, then the
  // maximum it subtracted (scale included, natural units; kNoKey if no key was seen) and the sum.
  void (*tile)(const BlockSparseAttentionParams&, const QueryTile&, const KeyGroup*,
               int64_t n_groups, const void* packed, void* scratch, float* partial);
};

constexpr float kNoKey = -1e30f;

// static: each unit has its own copies, compiled for its own instruction set
static inline const char* element(DType dtype, const void* base, const int64_t stride[3],
                                  int64_t b, int64_t h, int64_t t) {
  return static_cast<const char*>(base) +
         (b * stride[0] + h * stride[1] + t * stride[2]) * element_bytes(dtype);
}

// A key or value of a sequence, wherever its cache has it.
static inline const char* cached(const BlockSparseAttentionParams& p, const void* base,
                                 const int64_t stride[3], int64_t b, int64_t h, int64_t t) {
  if (p.block_table == nullptr) return element(p.dtype, base, stride, b, h, t);
  const int64_t in_page = t & ((int64_t{1} << p.page_bits) - 1);
  return element(p.dtype, base, stride, p.block_table[t >> p.page_bits], h, in_page);
}

// Whether the keys of a group lie one after the other: a page may be smaller than a group.
static inline bool in_one_piece(const BlockSparseAttentionParams& p, const KeyGroup& g) {
  return g.tokens == nullptr && (p.block_table == nullptr || 1 << p.page_bits >= kGroupKeys);
}

static inline int64_t nothing_packed(const BlockSparseAttentionParams&) { return 0; }
static inline void pack_nothing(const BlockSparseAttentionParams&, int64_t, int64_t, int64_t,
                                int64_t, void*) {}

// bf16 only
extern const AttentionKernel kAttentionAmx, kAttentionAvx512Bf16, kDecodeAvx512Bf16;
// every dtype
extern const AttentionKernel kAttentionAvx512, kAttentionAvx2, kAttentionPortable;
// every dtype, few rows: bound by memory, reads keys and values once and in place
extern const AttentionKernel kDecodeAvx512, kDecodeAvx2, kDecodePortable;

}  // namespace sparse_attn
