// What the plan on the host and the kernel agree on: sizes of a tile, and a launch's parameters.
#pragma once
#include "../common/params.h"

#ifdef __CUDACC__
#define SA_HOST_DEVICE __host__ __device__
#else
#define SA_HOST_DEVICE
#endif

namespace sparse_attn {

// A thread block attends with `rows` queries x heads to `keys` keys at a time; head dimensions are
// padded with zeros to `dim`.
//   rows = 128: four warps of 32 rows each, so that a fragment of keys serves two products
//   rows = 64:  four warps of 16 rows each
//   rows = 16:  every warp has all rows and 16 of the keys
struct AttentionTile {
  int dim;   // 64, 96, 128 or 256
  int rows;  // 16, 64, and 128 where dim <= 128

  static constexpr int kStages = 3;  // slots for keys or values: one in use, two being filled
  static constexpr int kWorkBytes = 256;

  SA_HOST_DEVICE constexpr int keys() const { return dim <= 128 ? 64 : 32; }
  SA_HOST_DEVICE constexpr int row_warps() const { return rows == 16 ? 1 : 4; }
  SA_HOST_DEVICE constexpr int key_warps() const { return rows == 16 ? keys() / 16 : 1; }
  SA_HOST_DEVICE constexpr int threads() const { return 32 * row_warps() * key_warps(); }
  SA_HOST_DEVICE constexpr int query_bytes() const { return rows * dim * 2; }
  SA_HOST_DEVICE constexpr int slot_bytes() const { return keys() * dim * 2; }
  SA_HOST_DEVICE constexpr int token_bytes() const { return 2 * keys() * 4; }  // of two tiles
  SA_HOST_DEVICE constexpr int shared_bytes() const {
    return query_bytes() + kStages * slot_bytes() + token_bytes() + kWorkBytes;
  }
  // of a paged call: where the tokens lie comes after all else
  SA_HOST_DEVICE constexpr int shared_bytes(bool paged) const {
    return shared_bytes() + (paged ? token_bytes() : 0);
  }
};

// Head dimensions a kernel exists for.
constexpr int kAttentionDims[] = {64, 96, 128, 256};

struct BlockSparseAttentionCudaParams {
  BlockSparseAttentionParams call;
  int32_t key_row_bytes, value_row_bytes;
  int64_t key_page_bytes, value_page_bytes;
  int32_t queries, heads;  // of a tile: their product is at most its rows
  int32_t query_tiles;     // per query block
  int32_t head_tiles;      // per KV head
  int32_t splits;          // blocks that share the keys of a tile
  // where splits > 1, for each tile and split the numerators, references and denominators of the
  // rows that it found, and for each tile how many of its blocks are done: zero at the start
  float* part_values;  // [tiles, splits, heads * queries, Dv]
  float* part_stats;   // [tiles, splits, heads * queries, 2]
  int32_t* done;       // [tiles]
};

}  // namespace sparse_attn
