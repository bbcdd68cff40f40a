// Scores of queries against centroids, in units of log2 e: what becomes of them is the mode.
//
// A block of threads has a tile of rows and a share of the clusters. With few queries the rows are
// those of all heads of a group, so that each centroid is read once, and the scores are kept. With
// many a first pass finds the extent of each row, and a second computes the scores again and sums
// the probabilities of the rows per cluster. Clusters that take no part are not read.
#pragma once
#include "block_sparse_attention.cuh"
#include "squeezed_lookup_params.h"

namespace sparse_attn {

constexpr float kLog2e = 1.44269504088896341f;

// The largest of some scores, and the sum of 2^(score - largest). Scores that are NaN or +infinity
// make the sum NaN.
struct Extent {
  float top = -kInfinity, sum = 0;

  __device__ static float reference(float top) { return top == -kInfinity ? 0 : top; }

  __device__ __forceinline__ void add(float score) {
    if (score <= top) {
      sum += exp2_approx(score - reference(top));
      return;
    }
    const float higher = fmaxf(top, score);  // that which is not NaN
    sum = sum * exp2_approx(top - reference(higher)) + exp2_approx(score - reference(higher));
    top = higher;
  }

  __device__ __forceinline__ void join(const Extent& other) {
    const float higher = fmaxf(top, other.top), zero = reference(higher);
    sum = sum * exp2_approx(top - zero) + other.sum * exp2_approx(other.top - zero);
    top = higher;
  }

  __device__ __forceinline__ void join_lanes(int lanes) {
    join({__shfl_xor_sync(0xffffffff, top, lanes), __shfl_xor_sync(0xffffffff, sum, lanes)});
  }

  __device__ __forceinline__ float log_sum() const { return top + log2f(sum); }
};

// Infinite in a row whose sum is not finite.
__device__ __forceinline__ float probability(float score, float log_sum) {
  return fabsf(log_sum) < kInfinity ? exp2_approx(score - log_sum) : kInfinity;
}

__device__ __forceinline__ const SqueezedLevel& level_of(const SqueezedLookupCudaParams& p) {
  return p.at_coarse ? p.call.coarse : p.call.fine;
}

__device__ __forceinline__ const SqueezedLookupScratch& scratch_of(
    const SqueezedLookupCudaParams& p) {
  return p.at_coarse ? p.coarse : p.fine;
}

// Flags of a choice's clusters that take part; null: all do.
__device__ __forceinline__ const uint8_t* alive_of(const SqueezedLookupCudaParams& p,
                                                   int64_t choice) {
  return p.at_coarse || p.call.coarse.K == 0 ? nullptr : p.alive + choice * p.call.fine.K;
}

__device__ __forceinline__ void find_rows(RowTile& rows, const SqueezedLookupCudaParams& p,
                                          int splits) {
  const auto& c = p.call;
  const int Hkv = static_cast<int>(c.Hkv), group = static_cast<int>(c.Hq) / Hkv;
  int i = static_cast<int>(blockIdx.x);
  rows.split = i % splits, i /= splits;
  const int head_tile = i % p.head_tiles;
  i /= p.head_tiles;
  const int query_tile = i % p.query_tiles;
  i /= p.query_tiles;
  rows.kv_head = i % Hkv, rows.batch = i / Hkv;
  rows.first_head = rows.kv_head * group + head_tile * p.heads;
  rows.heads = min(p.heads, group - head_tile * p.heads);
  rows.queries = p.queries, rows.query_block = query_tile;
  rows.first_query = query_tile * p.queries;
  rows.end_query = min(rows.first_query + p.queries, static_cast<int>(c.Tq));
}

// The clusters of a tile of rows, tile by tile, through shared memory.
template <class C>
struct ClusterTiles {
  const SqueezedLookupCudaParams& p;
  const RowTile& rows;
  unsigned char* slots;
  int* tokens;     // [kLookupRing][kKeys]
  float* weights;  // [kLookupRing][sets][kKeys] log2 of the keys of a cluster
  int sets, begin, end;

  __device__ int* tokens_of(int tile) const { return tokens + tile % kLookupRing * C::kKeys; }
  __device__ float* weights_of(int tile, int set) const {
    return weights + (tile % kLookupRing * sets + set) * C::kKeys;
  }
  __device__ typename C::Tile slot(int tile) const {
    return {slots + (tile - begin) % C::kStages * C::kSlotBytes};
  }

  // What takes part in a tile, for the threads that come after a barrier.
  __device__ void find(int tile) const {
    const int thread = threadIdx.x;
    if (thread >= C::kKeys || tile >= end) return;
    const SqueezedLevel& level = level_of(p);
    const int cluster = tile * C::kKeys + thread;
    float weight = -kInfinity;
    if (cluster < level.K)
      weight = kLog2e * level.log_counts[rows.batch * level.log_counts_stride[0] +
                                         rows.kv_head * level.log_counts_stride[1] + cluster];
    bool any = false;
    const int64_t first = (rows.batch * p.call.Hq + rows.first_head) / (p.call.Hq / p.call.Hd);
    for (int set = 0; set < sets; ++set) {
      const uint8_t* const alive = alive_of(p, first + min(set, rows.heads - 1));
      const bool part = weight > -kInfinity && (alive == nullptr || alive[cluster] != 0);
      weights_of(tile, set)[thread] = part ? weight : -kInfinity;
      any |= part;
    }
    tokens_of(tile)[thread] = any ? cluster : -1;
  }

  __device__ void copy(int tile) const {
    if (tile < end) {
      const SqueezedLevel& level = level_of(p);
      const auto* from = static_cast<const typename C::T*>(level.centroids) +
                         rows.batch * level.centroids_stride[0] +
                         rows.kv_head * level.centroids_stride[1];
      int token[C::kKeys];  // first all of them: reads of shared memory would wait for the copies
      each_chunk<C, C::kKeys>([&](int i, int row, int) { token[i] = tokens_of(tile)[row]; });
      const auto to = slot(tile);
      each_chunk<C, C::kKeys>([&](int i, int row, int chunk) {
        cp_async_16(to.at(row, chunk),
                    from + int64_t{max(token[i], 0)} * level.centroids_stride[2] + chunk * 8,
                    token[i] >= 0 && chunk * 8 < p.call.D);
      });
    }
    cp_async_commit();
  }
};

// Calls `f(m, h, n, i, column, score)` for the lane's scores of a tile.
template <class C, class F>
__device__ __forceinline__ void each_score(const typename C::Scores& s, float scale, int first_key,
                                           F f) {
#pragma unroll
  for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first_key + 8 * n + threadIdx.x % 4 * 2 + i;
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) f(m, h, n, i, column, s[m][n][2 * h + i] * scale);
    }
}

__device__ __forceinline__ int64_t index_of_row(const SqueezedLookupCudaParams& p,
                                                const RowTile& rows, int row) {
  return (rows.batch * p.call.Hq + rows.head_of(row)) * p.call.Tq + rows.query_of(row);
}

// Extents of the rows of the warps, where several have the same rows joined in their order.
template <class C>
__device__ __forceinline__ void store_extents(const SqueezedLookupCudaParams& p,
                                              const RowTile& rows,
                                              Extent (&extent)[C::kRowTiles][2], int first_row,
                                              unsigned char* memory) {
  const auto to = [&](int row) {
    const auto& scratch = scratch_of(p);
    return scratch.extent + (index_of_row(p, rows, row) * scratch.splits + rows.split) * 2;
  };
  auto* const warps = reinterpret_cast<float*>(memory);  // [kKeyWarps][kRows][2]
  __syncthreads();
  each_row<C>(first_row, [&](int row, int m, int h) {
    Extent& e = extent[m][h];
    e.join_lanes(1), e.join_lanes(2);
    if (threadIdx.x % 4 != 0 || !rows.has(row)) return;
    float* const at = C::kKeyWarps == 1 ? to(row) : warps + (threadIdx.x / 32 * C::kRows + row) * 2;
    at[0] = e.top, at[1] = e.sum;
  });
  if (C::kKeyWarps == 1) return;
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= C::kRows || !rows.has(row)) return;
  Extent all;
  for (int w = 0; w < C::kKeyWarps; ++w)
    all.join({warps[(w * C::kRows + row) * 2], warps[(w * C::kRows + row) * 2 + 1]});
  to(row)[0] = all.top, to(row)[1] = all.sum;
}

// log2 of a row's sum over all clusters, from the extents of the splits in their order.
__device__ __forceinline__ float log_sum_of_row(const SqueezedLookupScratch& scratch,
                                                int64_t row) {
  const float* const from = scratch.extent + row * scratch.splits * 2;
  Extent all;
  for (int i = 0; i < scratch.splits; ++i) all.join({from[2 * i], from[2 * i + 1]});
  return all.log_sum();
}

template <class T, int kDim, int kRows, int kMode>
__global__ void __launch_bounds__(AttentionConfig<T, kDim, kRows>::kThreads)
    cluster_scores_kernel(const __grid_constant__ SqueezedLookupCudaParams p) {
  using C = AttentionConfig<T, kDim, kRows>;
  static_assert(C::kKeyWarps == 1 || kMode == kKeepScores);
  SA_SHARED_MEMORY(memory);
  const SqueezedLookupScratch& scratch = scratch_of(p);
  const int sets = p.at_coarse ? 1 : p.sets;
  const LookupTail tail{C::kKeys, sets};
  const typename C::Tile query{memory};
  unsigned char* const slots = memory + C::kQueryBytes;
  unsigned char* const after = slots + C::kStages * C::kSlotBytes;
  auto* const weights = reinterpret_cast<float*>(after + tail.tokens_bytes());
  float* const columns = weights + tail.weights_bytes() / 4;
  auto& rows = *reinterpret_cast<RowTile*>(columns + tail.columns_bytes() / 4);
  static_assert(sizeof(RowTile) <= 64);
  if (threadIdx.x == 0) find_rows(rows, p, scratch.splits);
  __syncthreads();
  const int n_tiles = static_cast<int>(scratch.row) / C::kKeys;
  const ClusterTiles<C> tiles{
      p, rows, slots, reinterpret_cast<int*>(after), weights, sets,
      static_cast<int>(int64_t{n_tiles} * rows.split / scratch.splits),
      static_cast<int>(int64_t{n_tiles} * (rows.split + 1) / scratch.splits)};
  for (int i = 0; i < 3; ++i) tiles.find(tiles.begin + i);
  __syncthreads();
  tiles.copy(tiles.begin);
  tiles.copy(tiles.begin + 1);
  // the last slot is still free
  load_query<C>(query, reinterpret_cast<int64_t*>(slots + 2 * C::kSlotBytes), p, rows);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_row = C::kKeyWarps == 1 ? warp * C::kRowTiles * 16 : 0;
  const int first_key = C::kKeyWarps == 1 ? 0 : warp * C::kKeyTiles * 8;
  const float scale = fabsf(p.call.scale) * kLog2e;  // load_query has changed the sign
  int64_t index[C::kRowTiles][2];  // of the lane's rows; -1: there is no such row
  int set[C::kRowTiles][2];
  Extent extent[C::kRowTiles][2];
  float log_sums[C::kRowTiles][2];
  each_row<C>(first_row, [&](int row, int m, int h) {
    index[m][h] = rows.has(row) ? index_of_row(p, rows, row) : -1;
    set[m][h] = sets == 1 ? 0 : row / rows.queries;
    if (kMode == kSumProbabilities && rows.has(row))
      log_sums[m][h] = log_sum_of_row(scratch, index[m][h]);
  });
  // the sums of a tile, once all warps have left it
  const auto store_columns = [&](int tile) {
    if (kMode != kSumProbabilities || thread >= C::kKeys) return;
    const float* const from = columns + (tile & 1) * 4 * C::kKeys + thread;
    const int64_t part =
        (rows.batch * p.call.Hq + rows.first_head) * p.query_tiles + rows.query_block;
    scratch.scores[part * scratch.row + tile * C::kKeys + thread] =
        from[0] + from[C::kKeys] + from[2 * C::kKeys] + from[3 * C::kKeys];
  };
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    cp_async_wait<1>();
    __syncthreads();
    tiles.copy(tile + 2);
    if (tile > tiles.begin) store_columns(tile - 1);
    typename C::Scores scores;
    multiply_query_key<C>(scores, query, tiles.slot(tile), first_row, first_key);
    if constexpr (kMode == kSumProbabilities) {
      float sums[C::kKeyTiles][2] = {};
      each_score<C>(scores, scale, first_key, [&](int m, int h, int n, int i, int column, float a) {
        if (index[m][h] >= 0 && tiles.weights_of(tile, 0)[column] > -kInfinity)
          sums[n][i] += probability(a, log_sums[m][h]);
      });
#pragma unroll
      for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float x = sums[n][i];
          for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
          if (lane < 4) columns[((tile & 1) * 4 + warp) * C::kKeys + 8 * n + lane * 2 + i] = x;
        }
    } else {
      each_score<C>(scores, scale, first_key, [&](int m, int h, int, int, int column, float a) {
        if (index[m][h] < 0) return;
        if (kMode == kKeepScores)
          scratch.scores[index[m][h] * scratch.row + tile * C::kKeys + column] = a;
        const float weight = tiles.weights_of(tile, set[m][h])[column];
        if (weight > -kInfinity) extent[m][h].add(a + weight);
      });
    }
    tiles.find(tile + 3);
  }
  if constexpr (kMode == kSumProbabilities) {
    __syncthreads();
    if (tiles.begin < tiles.end) store_columns(tiles.end - 1);
  } else {
    store_extents<C>(p, rows, extent, first_row, memory);
  }
}

}  // namespace sparse_attn
