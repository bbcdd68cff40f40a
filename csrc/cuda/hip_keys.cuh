// Scores of gathered keys, by warp: what hip_select and hip_prune_select share.
//
// A tile is 16 keys from anywhere. Each warp has a ring of tiles of its own, filled by asynchronous
// copies, so that warps never wait for each other while they score. A key's score is its largest
// product with the rows of queries in shared memory.
#pragma once
#include "hip_cuda_params.h"
#include "shared_tile.cuh"
#include "top_k.cuh"

namespace sparse_attn {

constexpr uint32_t kAllLanes = 0xffffffff;
static_assert(sizeof(TopKShared) == kHipTopKBytes);

// The sampled queries of one block of queries: every stride-th, counted back from the last.
struct SampledRows {
  int last, n;  // last query; how many of each head
  int limit;    // last key that the last of them may count, or -1
  int stride;
  bool causal;

  __device__ __forceinline__ SampledRows(const HipParams& p, int64_t block, int64_t every,
                                         int n_keys) {
    const int64_t first = block * p.q_block, end = min(first + p.q_block, p.Tq);
    last = static_cast<int>(end) - 1, stride = static_cast<int>(every), causal = p.causal;
    n = static_cast<int>((end - 1 - first) / every) + 1;
    const int64_t own = causal ? n_keys - p.Tq + last - p.window : int64_t{n_keys} - 1;
    limit = static_cast<int>(max(own, int64_t{-1}));
  }
  __device__ __forceinline__ int query(int i) const { return last - stride * (n - 1 - i); }
  __device__ __forceinline__ int limit_of(int i) const {
    return causal ? limit - stride * (n - 1 - i) : limit;
  }
};

// The keys of one sequence and head. A wrong length or page is clamped: neither leads outside of the
// keys or the cache.
template <class T>
struct KeyRows {
  const T* base;
  const int32_t* table;  // of the sequence, or null
  int64_t page_stride, token_stride;
  int n, page_bits, last_page;

  __device__ __forceinline__ KeyRows(const HipParams& p, int64_t batch, int64_t kv_head) {
    const bool paged = p.block_table != nullptr;
    base = static_cast<const T*>(p.key) + kv_head * p.key_stride[1];
    if (!paged) base += batch * p.key_stride[0];
    table = paged ? p.block_table + batch * p.block_table_stride : nullptr;
    page_stride = p.key_stride[0], token_stride = p.key_stride[2];
    page_bits = static_cast<int>(p.page_bits), last_page = static_cast<int>(p.pages) - 1;
    n = static_cast<int>(p.Tk);
    if (p.kv_lengths != nullptr) n = min(max(p.kv_lengths[batch], 0), n);
  }
  __device__ __forceinline__ int64_t offset(int token) const {
    if (table == nullptr) return token * token_stride;
    const int page = min(max(table[token >> page_bits], 0), last_page);
    return page * page_stride + (token & (1 << page_bits) - 1) * token_stride;
  }
};

// Rows of queries in shared memory and what each of them may count.
template <class T, int kDim>
struct QueryRows {
  SharedTile<kDim> tile;
  int* limits;
  int capacity;     // rows that there is room for
  int rows, steps;  // multiples of 16, of the rows and of the head dimension
  int limit;        // that holds for all rows
  float sign;

  __device__ __forceinline__ QueryRows(const HipParams& p, unsigned char* memory, int* limits,
                                       int64_t capacity)
      : tile{memory}, limits(limits), capacity(static_cast<int>(capacity)), rows(0),
        steps(static_cast<int>((p.D + 15) / 16)), limit(0), sign(p.sign) {}

  // Loads rows first.. of `heads` heads from `head` on; missing ones repeat the last, which changes
  // no maximum. Ends with a barrier, before which no thread may still read the rows before.
  __device__ __forceinline__ void load(const HipParams& p, int64_t batch, int64_t head,
                                       int heads, const SampledRows& sampled, int first) {
    const int total = heads * sampled.n, left = min(total - first, capacity);
    rows = (left + 15) / 16 * 16;
    const T* const query = static_cast<const T*>(p.query) + batch * p.query_stride[0] +
                           head * p.query_stride[1];
    for (int i = threadIdx.x; i < rows * SharedTile<kDim>::kChunks; i += blockDim.x) {
      const int row = i / SharedTile<kDim>::kChunks, piece = i % SharedTile<kDim>::kChunks;
      if (piece >= 2 * steps) continue;
      const int of_all = min(first + row, total - 1), of_head = of_all % sampled.n;
      const bool valid = piece * 8 < static_cast<int>(p.D);
      const T* const from = query + of_all / sampled.n * p.query_stride[1] +
                            sampled.query(of_head) * p.query_stride[2];
      cp_async_16(tile.at(row, piece), valid ? from + piece * 8 : query, valid);
      if (piece == 0) limits[row] = sampled.limit_of(of_head);
    }
    cp_async_commit();
    limit = sampled.limit_of(0);
    cp_async_wait<0>();
    __syncthreads();
  }
};

// Fills a tile with the keys of tokens; lane i names that of row i % 16, -1 for none.
template <class T, int kDim>
__device__ __forceinline__ void copy_keys(const SharedTile<kDim>& to, const KeyRows<T>& keys,
                                          int token, int D) {
  constexpr int kChunks = SharedTile<kDim>::kChunks, kRows = 32 / kChunks < 1 ? 1 : 32 / kChunks;
  constexpr int kPieces = kChunks < 32 ? kChunks : 32;
  const int lane = threadIdx.x % 32, pieces = (D + 15) / 16 * 2;
  const bool exists = token >= 0 && token < keys.n;
  const int64_t offset = exists ? keys.offset(token) : -1;
#pragma unroll
  for (int first = 0; first < kHipTileKeys; first += kRows) {
    const int row = first + lane / kPieces, piece = lane % kPieces;
    const int64_t from = __shfl_sync(kAllLanes, offset, row);
    const bool valid = from >= 0 && piece * 8 < D;
    if (piece < pieces)
      cp_async_16(to.at(row, piece), keys.base + (valid ? from + piece * 8 : 0), valid);
  }
}

// The scores of the keys in rows lane / 4 and 8 + lane / 4 of a tile; their tokens are named where
// some row may not count some key.
template <class T, int kDim>
__device__ __forceinline__ void score_tile(const SharedTile<kDim>& keys,
                                           const QueryRows<T, kDim>& query, bool masked,
                                           const int (&token)[2], float (&best)[2]) {
  const int lane = threadIdx.x % 32;
  const auto key_lane = keys.lane(lane % 16, lane / 16);
  const auto query_lane = query.tile.lane(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  best[0] = best[1] = -kInfinity;
  for (int row = 0; row < query.rows; row += 32) {
    const bool wide = row + 16 < query.rows;
    float sums[4][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      if (step >= query.steps) break;
      uint32_t a[4], b[4];
      ldmatrix_x4(a, key_lane.at(0, 2 * step));
      ldmatrix_x4(b, query_lane.at(row, 2 * step));
      mma_m16n8k16<T>(sums[0], a, b[0], b[1]);
      mma_m16n8k16<T>(sums[1], a, b[2], b[3]);
      if (!wide) continue;
      ldmatrix_x4(b, query_lane.at(row + 16, 2 * step));
      mma_m16n8k16<T>(sums[2], a, b[0], b[1]);
      mma_m16n8k16<T>(sums[3], a, b[2], b[3]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= 2 && !wide) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = sums[j][e] * query.sign;
        if (!masked || token[e / 2] <= query.limits[row + 8 * j + lane % 4 * 2 + e % 2])
          best[e / 2] = fmaxf(best[e / 2], x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2)
      best[i] = fmaxf(best[i], __shfl_xor_sync(kAllLanes, best[i], lanes));
}

// A warp's ring of tiles.
template <int kDim>
struct KeyRing {
  static constexpr int kTileBytes = kHipTileKeys * SharedTile<kDim>::kRowBytes;

  unsigned char* base;

  __device__ __forceinline__ explicit KeyRing(unsigned char* rings)
      : base(rings + threadIdx.x / 32 * (kHipTiles * kTileBytes)) {}
  __device__ __forceinline__ SharedTile<kDim> stage(int i) const { return {base + i * kTileBytes}; }
};

// Scores n tokens: calls take(i, score) once for each. token_of(i) names the key, bound_of(i) one
// at or after the keys of all tokens up to i. The warps of the block share the work.
template <class T, int kDim, class TokenOf, class BoundOf, class Take>
__device__ __forceinline__ void score_tokens(const KeyRows<T>& keys,
                                             const QueryRows<T, kDim>& query, int D,
                                             unsigned char* rings, int n, TokenOf token_of,
                                             BoundOf bound_of, Take take) {
  const KeyRing<kDim> ring(rings);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto fetch = [&](int i) {
    const int first = (warp + i * warps) * kHipTileKeys, token = first + lane % kHipTileKeys;
    if (first < n)
      copy_keys(ring.stage(i % kHipTiles), keys, token < n ? token_of(token) : -1, D);
    cp_async_commit();
  };
  for (int i = 0; i < kHipTiles - 1; ++i) fetch(i);
  for (int i = 0;; ++i) {
    const int first = (warp + i * warps) * kHipTileKeys, row = first + lane / 4;
    if (first >= n) break;
    fetch(i + kHipTiles - 1);
    cp_async_wait<kHipTiles - 1>();
    __syncwarp();
    const bool masked = bound_of(min(first + kHipTileKeys, n) - 1) > query.limit;
    int token[2] = {};
    if (masked) token[0] = token_of(min(row, n - 1)), token[1] = token_of(min(row + 8, n - 1));
    float best[2];
    score_tile(ring.stage(i % kHipTiles), query, masked, token, best);
    if (lane % 4 == 0 && row < n) take(row, best[0]);
    if (lane % 4 == 1 && row + 8 < n) take(row + 8, best[1]);
    __syncwarp();  // the stage has been read
  }
  cp_async_wait<0>();
}

}  // namespace sparse_attn
