// The configuration of a thread block and the rows that it owns.
#pragma once
#include "block_sparse_attention_tile.h"
#include "shared_tile.cuh"

namespace sparse_attn {

template <class T_, int kDim_, int kRows_>
struct AttentionConfig {
  using T = T_;
  static constexpr AttentionTile kTile{kDim_, kRows_};
  static constexpr int kDim = kDim_, kRows = kRows_;
  static constexpr int kKeys = kTile.keys(), kThreads = kTile.threads();
  static constexpr int kKeyWarps = kTile.key_warps();
  static constexpr int kStages = AttentionTile::kStages;
  static constexpr int kSlotBytes = kTile.slot_bytes(), kQueryBytes = kTile.query_bytes();
  static constexpr int kTokenBytes = kTile.token_bytes();
  // of a warp, in matrix fragments
  static constexpr int kRowTiles = kRows / 16 / kTile.row_warps();  // of 16
  static constexpr int kKeyTiles = kKeys / 8 / kKeyWarps;           // of 8
  static constexpr int kDimTiles = kDim / 8;                        // of 8

  using Tile = SharedTile<kDim>;
  using Scores = float[kRowTiles][kKeyTiles][4];
  using Weights = uint32_t[kRowTiles][kKeyTiles / 2][4];
  using Output = float[kRowTiles][kDimTiles][4];
};

// Which rows a block owns. Row r is query first_query + r % queries of head
// first_head + r / queries.
struct RowTile {
  int64_t batch;
  int64_t index;  // of the tile
  int split;      // which share of its keys
  int kv_head, first_head, heads;
  int query_block, first_query, queries, end_query;

  __device__ int head_of(int row) const { return first_head + row / queries; }
  __device__ int query_of(int row) const { return first_query + row % queries; }
  __device__ bool has(int row) const { return row < heads * queries && query_of(row) < end_query; }
};

__device__ __forceinline__ void find_rows(RowTile& rows, const BlockSparseAttentionCudaParams& p) {
  const auto& c = p.call;
  const int Hkv = static_cast<int>(c.Hkv), group = static_cast<int>(c.Hq) / Hkv;
  const int q_block = static_cast<int>(c.q_block);
  int i = static_cast<int>(blockIdx.x);
  rows.split = i % p.splits;
  rows.index = i = i / p.splits;
  const int head_tile = i % p.head_tiles;
  i /= p.head_tiles;
  // the last queries see most keys: first, so that the short rows fill the gaps at the end
  const int query_tiles = static_cast<int>(c.Mq) * p.query_tiles;
  const int query_tile = query_tiles - 1 - i % query_tiles;
  i /= query_tiles;
  rows.kv_head = i % Hkv;
  rows.batch = i / Hkv;
  rows.first_head = rows.kv_head * group + head_tile * p.heads;
  rows.heads = min(p.heads, group - head_tile * p.heads);
  rows.queries = p.queries;
  rows.query_block = query_tile / p.query_tiles;
  rows.first_query = rows.query_block * q_block + query_tile % p.query_tiles * p.queries;
  const int end_block = min((rows.query_block + 1) * q_block, static_cast<int>(c.Tq));
  rows.end_query = min(rows.first_query + p.queries, end_block);
}

}  // namespace sparse_attn
