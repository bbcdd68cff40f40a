// Attention over listed blocks of keys, a sink and a window: one kernel for prefill and decode.
//
// A thread block owns a tile of rows: queries of one query block, and of all heads of a group that
// read the same list, so that each key is loaded once for all of them. Its keys come tile by tile
// (key_runs.cuh), and for each tile there are two steps:
//   scores  = query key^T, and of them the weights (online_softmax.cuh)
//   acc    += weights value
// While one step computes, the keys and values of the next two are copied to shared memory.
// Where tiles are few, several blocks share the keys of one, and the last of them to finish joins
// what they found (join_parts.cuh).
#pragma once
#include "block_sparse_attention_tile.h"
#include "join_parts.cuh"
#include "key_runs.cuh"
#include "online_softmax.cuh"
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

// In shared memory: what one thread has found for all, whose registers are for scores.
template <class C>
struct Work {
  RowTile rows;
  KeyQuestion keys;
  KeyRuns<C::kKeys> runs;
};

__device__ __forceinline__ RowTile row_tile(const BlockSparseAttentionCudaParams& p) {
  const auto& c = p.call;
  const int group = static_cast<int>(c.Hq / c.Hkv), q_block = static_cast<int>(c.q_block);
  RowTile rows;
  int64_t i = blockIdx.x;
  rows.split = static_cast<int>(i % p.splits);
  rows.index = i = i / p.splits;
  const int head_tile = static_cast<int>(i % p.head_tiles);
  i /= p.head_tiles;
  // the last queries see most keys: first, so that the short rows fill the gaps at the end
  const int query_tiles = static_cast<int>(c.Mq) * p.query_tiles;
  const int query_tile = query_tiles - 1 - static_cast<int>(i % query_tiles);
  i /= query_tiles;
  rows.kv_head = static_cast<int>(i % c.Hkv);
  rows.batch = i / c.Hkv;
  rows.first_head = rows.kv_head * group + head_tile * p.heads;
  rows.heads = min(p.heads, group - head_tile * p.heads);
  rows.queries = p.queries;
  rows.query_block = query_tile / p.query_tiles;
  rows.first_query = rows.query_block * q_block + query_tile % p.query_tiles * p.queries;
  const int end_block = min((rows.query_block + 1) * q_block, static_cast<int>(c.Tq));
  rows.end_query = min(rows.first_query + p.queries, end_block);
  return rows;
}

__device__ __forceinline__ KeyQuestion key_question(const BlockSparseAttentionCudaParams& p,
                                                    const RowTile& rows) {
  const auto& c = p.call;
  const int shift = static_cast<int>(c.Tk - c.Tq);
  const int64_t list_head = rows.first_head / (c.Hq / c.Hi);
  const int32_t* count = c.counts + rows.batch * c.counts_stride[0] +
                         list_head * c.counts_stride[1] + rows.query_block * c.counts_stride[2];
  const int64_t most = min(c.K, (c.Tk + c.kv_block - 1) / c.kv_block);
  KeyQuestion q;
  q.first_position = shift + rows.first_query;
  q.last_position = shift + rows.end_query - 1;
  q.n_keys = static_cast<int>(c.Tk);
  q.sink = static_cast<int>(min(c.sink, c.Tk));
  q.window = static_cast<int>(min(c.window, c.Tk));
  q.kv_block = static_cast<int>(c.kv_block);
  q.causal = c.causal;
  q.list = c.indices + rows.batch * c.indices_stride[0] + list_head * c.indices_stride[1] +
           rows.query_block * c.indices_stride[2];
  q.listed = min(max(*count, 0), static_cast<int>(most));
  return q;
}

// Calls `f(i, row, chunk)` for the thread's share of the chunks of kRows rows, i = 0, 1, ...
template <class C, int kRows, class F>
__device__ __forceinline__ void each_chunk(F f) {
  constexpr int kChunks = C::Tile::kChunks, kAtOnce = C::kThreads / kChunks;  // rows
  const int chunk = threadIdx.x % kChunks, first_row = threadIdx.x / kChunks;
  if (C::kThreads % kChunks != 0 && first_row >= kAtOnce) return;
#pragma unroll
  for (int i = 0; i * kAtOnce < kRows; ++i) {
    const int row = first_row + i * kAtOnce;
    if (kRows % kAtOnce != 0 && row >= kRows) break;
    f(i, row, chunk);
  }
}

// Zeros where there is no row, and beyond D. A negative scale changes the sign of the queries, so
// that softmax deals with positive ones only. `offsets` [kRows] is scratch memory.
template <class C>
__device__ __forceinline__ void load_query(typename C::Tile to, int64_t* offsets,
                                           const BlockSparseAttentionCudaParams& p,
                                           const RowTile& rows) {
  const auto& c = p.call;
  for (int row = threadIdx.x; row < C::kRows; row += C::kThreads)
    offsets[row] = rows.has(row) ? rows.batch * c.query_stride[0] +
                                       rows.head_of(row) * c.query_stride[1] +
                                       rows.query_of(row) * c.query_stride[2]
                                 : -1;
  __syncthreads();
  const auto* query = static_cast<const typename C::T*>(c.query);
  const uint32_t sign = c.scale < 0 ? 0x80008000u : 0;
  each_chunk<C, C::kRows>([&](int, int row, int chunk) {
    const int64_t offset = offsets[row];
    uint4 x{};
    if (offset >= 0 && chunk * 8 < c.D)
      x = *reinterpret_cast<const uint4*>(query + offset + chunk * 8);
    *reinterpret_cast<uint4*>(to.at(row, chunk)) = {x.x ^ sign, x.y ^ sign, x.z ^ sign, x.w ^ sign};
  });
}

// Starts to copy the keys or values of `tokens`, rows of `dims` elements; zeros where there is no
// key, and beyond `dims`.
template <class C>
__device__ __forceinline__ void copy_rows(typename C::Tile to, const typename C::T* from,
                                          int32_t row_bytes, int dims, const int* tokens) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  int token[C::kKeys];  // first all of them: reads of shared memory would wait for the copies
  each_chunk<C, C::kKeys>([&](int i, int row, int) { token[i] = tokens[row]; });
  each_chunk<C, C::kKeys>([&](int i, int row, int chunk) {
    cp_async_16(to.at(row, chunk), bytes + int64_t{max(token[i], 0)} * row_bytes + chunk * 16,
                token[i] >= 0 && chunk * 8 < dims);
  });
}

// s = query key^T, of the warp's rows and keys.
template <class C>
__device__ __forceinline__ void multiply_query_key(typename C::Scores& s, typename C::Tile query,
                                                   typename C::Tile key, int first_row,
                                                   int first_key) {
  const int lane = threadIdx.x % 32;
  const auto q = query.lane(first_row + lane % 16, lane / 16);
  const auto k = key.lane(first_key + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
#pragma unroll
  for (int d = 0; d < C::kDimTiles; d += 2) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) ldmatrix_x4(a[m], q.at(16 * m, d));
#pragma unroll
    for (int n = 0; n < C::kKeyTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, k.at(8 * n, d));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_m16n8k16<typename C::T>(s[m][n], a[m], b[0], b[1]);
        mma_m16n8k16<typename C::T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += weights value, of the warp's rows and keys.
template <class C>
__device__ __forceinline__ void multiply_weights_value(typename C::Output& acc,
                                                       const typename C::Weights& weights,
                                                       typename C::Tile value, int first_key) {
  const int lane = threadIdx.x % 32;
  const auto v = value.lane(first_key + lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < C::kKeyTiles / 2; ++k)
#pragma unroll
    for (int n = 0; n < C::kDimTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, v.at(16 * k, n));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_m16n8k16<typename C::T>(acc[m][n], weights[m][k], b[0], b[1]);
        mma_m16n8k16<typename C::T>(acc[m][n + 1], weights[m][k], b[2], b[3]);
      }
    }
}

// -infinity where a row does not see a key of a masked tile.
template <class C>
__device__ __forceinline__ void mask_scores(typename C::Scores& s, const KeyQuestion& keys,
                                            KeySource source, const RowTile& rows,
                                            const int* tokens, int first_row, int first_key) {
  const int lane = threadIdx.x % 32;
  const int shift = keys.first_position - rows.first_query;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 16 * m + 8 * h + lane / 4;
      const auto visible = VisibleKeys::of(keys, source, shift + rows.query_of(row));
#pragma unroll
      for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (!visible.sees(tokens[first_key + 8 * n + lane % 4 * 2 + i]))
            s[m][n][2 * h + i] = -kInfinity;
    }
}

// Calls `f(row, m, h)` for the rows of a warp that this lane has a part of.
template <class C, class F>
__device__ __forceinline__ void each_row(int first_row, F f) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(first_row + 16 * m + 8 * h + threadIdx.x % 32 / 4, m, h);
}

// Writes the rows of a warp, divided by their denominators.
template <class C>
__device__ __forceinline__ void store_rows(const BlockSparseAttentionCudaParams& p,
                                           const RowTile& rows, const typename C::Output& acc,
                                           const OnlineSoftmax<C::kRowTiles>& softmax,
                                           int first_row) {
  const auto& c = p.call;
  auto* out = static_cast<typename C::T*>(c.out) + rows.batch * c.out_stride[0];
  const int column = threadIdx.x % 4 * 2;
  each_row<C>(first_row, [&](int row, int m, int h) {
    if (!rows.has(row)) return;
    const int head = rows.head_of(row), query = rows.query_of(row);
    const float sum = softmax.sum[m][h], inverse = sum == 0 ? 0 : 1 / sum;
    auto* to = out + head * c.out_stride[1] + query * c.out_stride[2] + column;
#pragma unroll
    for (int n = 0; n < C::kDimTiles; ++n)
      if (8 * n < c.Dv)
        *reinterpret_cast<uint32_t*>(to + 8 * n) = pack_two<typename C::T>(
            acc[m][n][2 * h] * inverse, acc[m][n][2 * h + 1] * inverse);
    if (column == 0)
      c.lse[(rows.batch * c.Hq + head) * c.Tq + query] = log_sum(softmax.top[m][h], sum);
  });
}

// Writes the rows of a warp as a part that is yet to be joined with others.
template <class C>
__device__ __forceinline__ void store_part(const Parts& parts, int part, int n_rows, int dims,
                                           const typename C::Output& acc,
                                           const OnlineSoftmax<C::kRowTiles>& softmax,
                                           int first_row) {
  const int column = threadIdx.x % 4 * 2;
  each_row<C>(first_row, [&](int row, int m, int h) {
    if (row >= n_rows) return;
    float* to = parts.values + part * parts.value_step + row * parts.row_step + column;
#pragma unroll
    for (int n = 0; n < C::kDimTiles; ++n)
      if (8 * n < dims)
        *reinterpret_cast<float2*>(to + 8 * n) = {acc[m][n][2 * h], acc[m][n][2 * h + 1]};
    if (column == 0)
      *reinterpret_cast<float2*>(parts.stats + part * parts.stat_step + 2 * row) = {
          softmax.top[m][h], softmax.sum[m][h]};
  });
}

// Joins the parts of each row, a warp per row, and writes the results.
template <class C>
__device__ __forceinline__ void join_rows(const BlockSparseAttentionCudaParams& p,
                                          const RowTile& rows, const Parts& parts) {
  const auto& c = p.call;
  const int dims = static_cast<int>(c.Dv);
  auto* out = static_cast<typename C::T*>(c.out) + rows.batch * c.out_stride[0];
  for (int row = threadIdx.x / 32; row < rows.heads * rows.queries; row += C::kThreads / 32) {
    if (!rows.has(row)) continue;
    JoinedRow<C::kDim> joined;
    joined.join(parts, row, dims);
    const int head = rows.head_of(row), query = rows.query_of(row);
    const float inverse = joined.sum == 0 ? 0 : 1 / joined.sum;
    auto* to = out + head * c.out_stride[1] + query * c.out_stride[2];
    joined.each_vector(dims, [&](int column, const float(&x)[4]) {
      using T = typename C::T;
      *reinterpret_cast<uint2*>(to + column) = {pack_two<T>(x[0] * inverse, x[1] * inverse),
                                                pack_two<T>(x[2] * inverse, x[3] * inverse)};
    });
    if (threadIdx.x % 32 == 0)
      c.lse[(rows.batch * c.Hq + head) * c.Tq + query] = log_sum(joined.reference, joined.sum);
  }
}

// The same into one part, of a larger set.
template <class C>
__device__ __forceinline__ void join_into_part(const Parts& parts, const Parts& into, int part,
                                               int n_rows, int dims) {
  for (int row = threadIdx.x / 32; row < n_rows; row += C::kThreads / 32) {
    JoinedRow<C::kDim> joined;
    joined.join(parts, row, dims);
    joined.each_vector(dims, [&](int column, const float(&x)[4]) {
      *reinterpret_cast<float4*>(into.values + part * into.value_step + row * into.row_step +
                                 column) = {x[0], x[1], x[2], x[3]};
    });
    if (threadIdx.x % 32 == 0)
      *reinterpret_cast<float2*>(into.stats + part * into.stat_step + 2 * row) = {
          joined.reference, joined.sum};
  }
}

// Whether this block is the last of the tile's to come here; what the others wrote before is then
// visible to all its threads.
__device__ __forceinline__ bool last_block(int32_t* done, int blocks) {
  __threadfence();
  __syncthreads();
  const int last = threadIdx.x == 0 && atomicAdd(done, 1) == blocks - 1;
  const bool is_last = __syncthreads_or(last) != 0;
  if (is_last) __threadfence();
  return is_last;
}

// From the rows of the warps to the result.
template <class C>
__device__ __forceinline__ void finish_rows(const BlockSparseAttentionCudaParams& p,
                                            const RowTile& rows, unsigned char* memory,
                                            const typename C::Output& acc,
                                            const OnlineSoftmax<C::kRowTiles>& softmax,
                                            int first_row, int key_warp) {
  const int n_rows = p.heads * p.queries, dims = static_cast<int>(p.call.Dv);
  if (C::kKeyWarps == 1 && p.splits == 1)
    return store_rows<C>(p, rows, acc, softmax, first_row);

  const int64_t value_step = int64_t{n_rows} * dims, stat_step = 2 * n_rows;
  const int64_t first = rows.index * p.splits;
  const Parts splits{p.part_values + first * value_step, p.part_stats + first * stat_step,
                     value_step, stat_step, dims, p.splits};
  if (C::kKeyWarps == 1) {
    store_part<C>(splits, rows.split, n_rows, dims, acc, softmax, first_row);
  } else {
    __syncthreads();  // the slots of keys and values have served
    auto* values = reinterpret_cast<float*>(memory);
    const Parts warps{values, values + C::kKeyWarps * C::kRows * C::kDim, C::kRows * C::kDim,
                      2 * C::kRows, C::kDim, C::kKeyWarps};
    store_part<C>(warps, key_warp, n_rows, dims, acc, softmax, first_row);
    __syncthreads();
    if (p.splits == 1) return join_rows<C>(p, rows, warps);
    join_into_part<C>(warps, splits, rows.split, n_rows, dims);
  }
  if (last_block(p.done + rows.index, p.splits)) join_rows<C>(p, rows, splits);
}

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(AttentionConfig<T, kDim, kRows>::kThreads)
    block_sparse_attention_kernel(const __grid_constant__ BlockSparseAttentionCudaParams p) {
  using C = AttentionConfig<T, kDim, kRows>;
  SA_SHARED_MEMORY(memory);
  const typename C::Tile query{memory};
  unsigned char* const slots = memory + C::kQueryBytes;
  int* const tokens = reinterpret_cast<int*>(slots + C::kStages * C::kSlotBytes);  // of two tiles
  auto& work = *reinterpret_cast<Work<C>*>(tokens + 2 * C::kKeys);
  static_assert(sizeof(Work<C>) <= AttentionTile::kWorkBytes);
  const RowTile& rows = work.rows;
  const KeyQuestion& keys = work.keys;
  const auto& runs = work.runs;

  if (threadIdx.x == 0) {
    work.rows = row_tile(p);
    work.keys = key_question(p, work.rows);
  }
  __syncthreads();
  if (rows.first_query >= p.call.Tq) return;
  work.runs.build(keys);
  const int first_masked = runs.first_masked();
  const int begin = static_cast<int>(int64_t{runs.n_tiles()} * rows.split / p.splits);
  const int end = static_cast<int>(int64_t{runs.n_tiles()} * (rows.split + 1) / p.splits);

  const auto& c = p.call;
  const T* key = static_cast<const T*>(c.key) + rows.batch * c.key_stride[0] +
                 rows.kv_head * c.key_stride[1];
  const T* value = static_cast<const T*>(c.value) + rows.batch * c.value_stride[0] +
                   rows.kv_head * c.value_stride[1];
  const int thread = threadIdx.x;
  const auto tokens_of = [&](int tile) { return tokens + (tile & 1) * C::kKeys; };
  const auto find_token = [&](int tile) {
    return thread < C::kKeys && tile < end ? runs.token(keys, tile, thread) : -1;
  };
  const auto keep_token = [&](int tile, int token) {
    if (thread < C::kKeys) tokens_of(tile)[thread] = token;
  };
  // slots are filled in turn: keys of a tile, its values, keys of the next
  int filled = 0, used = 0;
  const auto next_slot = [&](int& slot) {
    const typename C::Tile tile{slots + slot * C::kSlotBytes};
    slot = slot == C::kStages - 1 ? 0 : slot + 1;
    return tile;
  };
  const auto copy_keys = [&](int tile) {
    if (tile < end)
      copy_rows<C>(next_slot(filled), key, p.key_row_bytes, static_cast<int>(c.D), tokens_of(tile));
    cp_async_commit();
  };
  const auto copy_values = [&](int tile) {
    if (tile < end)
      copy_rows<C>(next_slot(filled), value, p.value_row_bytes, static_cast<int>(c.Dv),
                   tokens_of(tile));
    cp_async_commit();
  };
  // the oldest copy has landed, for all threads, and all have left the step before
  const auto wait_for_slot = [&] {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
  };

  keep_token(begin, find_token(begin));
  keep_token(begin + 1, find_token(begin + 1));
  __syncthreads();
  copy_keys(begin);
  copy_values(begin);
  // the last slot is still free
  load_query<C>(query, reinterpret_cast<int64_t*>(slots + 2 * C::kSlotBytes), p, rows);

  const int warp = thread / 32;
  const int first_row = C::kKeyWarps == 1 ? warp * C::kRowTiles * 16 : 0;
  const int key_warp = C::kKeyWarps == 1 ? 0 : warp, first_key = key_warp * C::kKeyTiles * 8;
  constexpr float kLog2E = 1.44269504088896341f;
  OnlineSoftmax<C::kRowTiles> softmax(fmaxf(fabsf(c.scale), 1e-30f) * kLog2E);
  typename C::Output acc = {};
  for (int tile = begin; tile < end; ++tile) {
    typename C::Weights weights;
    {
      wait_for_slot();
      copy_keys(tile + 1);
      typename C::Scores scores;
      multiply_query_key<C>(scores, query, next_slot(used), first_row, first_key);
      if (tile >= first_masked)
        mask_scores<C>(scores, keys, runs.source(runs.run_of(tile)), rows, tokens_of(tile),
                       first_row, first_key);
      softmax.template add<T>(scores, acc, weights);
    }
    wait_for_slot();
    copy_values(tile + 1);
    // found here, kept after the products: nobody waits for the list
    const int token = find_token(tile + 2);
    multiply_weights_value<C>(acc, weights, next_slot(used), first_key);
    keep_token(tile + 2, token);
  }
  softmax.finish();
  finish_rows<C>(p, rows, memory, acc, softmax, first_row, key_warp);
}

}  // namespace sparse_attn
