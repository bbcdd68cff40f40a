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
#include "block_sparse_attention_finish.cuh"
#include "key_runs.cuh"

namespace sparse_attn {

// In shared memory: what one thread has found for all, whose registers are for scores.
template <class C>
struct Work {
  RowTile rows;
  KeyQuestion keys;
  KeyRuns<C::kKeys> runs;
};

__device__ __forceinline__ void ask_for_keys(KeyQuestion& q,
                                             const BlockSparseAttentionCudaParams& p,
                                             const RowTile& rows) {
  const auto& c = p.call;
  q.n_keys = static_cast<int>(c.Tk);
  if (c.kv_lengths != nullptr) q.n_keys = min(max(c.kv_lengths[rows.batch], 0), q.n_keys);
  const int shift = q.n_keys - static_cast<int>(c.Tq);
  const int64_t list_head = rows.first_head / (static_cast<int>(c.Hq) / static_cast<int>(c.Hi));
  const int32_t* count = c.counts + rows.batch * c.counts_stride[0] +
                         list_head * c.counts_stride[1] + rows.query_block * c.counts_stride[2];
  const int64_t most = min(c.K, (c.Tk + c.kv_block - 1) / c.kv_block);
  q.first_position = shift + rows.first_query;
  q.last_position = shift + rows.end_query - 1;
  q.sink = static_cast<int>(min(c.sink, int64_t{q.n_keys}));
  q.window = static_cast<int>(min(c.window, c.Tk));
  q.kv_block = static_cast<int>(c.kv_block);
  q.causal = c.causal;
  q.list = c.indices + rows.batch * c.indices_stride[0] + list_head * c.indices_stride[1] +
           rows.query_block * c.indices_stride[2];
  q.pages = c.block_table + rows.batch * c.block_table_stride;
  q.listed = min(max(*count, 0), static_cast<int>(most));
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
template <class C, class P>
__device__ __forceinline__ void load_query(typename C::Tile to, int64_t* offsets, const P& p,
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

// Which row of the cache holds a token of a sequence, counted through its pages; -1 for none and
// for a page that there is not: no table leads outside of the cache.
__device__ __forceinline__ int row_in_pages(const BlockSparseAttentionParams& c,
                                            const KeyQuestion& q, int token) {
  if (token < 0) return -1;
  const int bits = static_cast<int>(c.page_bits);
  const int page = __ldg(q.pages + (token >> bits));
  return page >= 0 && page < c.pages ? page << bits | (token & ((1 << bits) - 1)) : -1;
}

// The first row of keys or values of a KV head: of the sequence, or of all pages.
template <class T>
__device__ __forceinline__ const unsigned char* first_row(const BlockSparseAttentionParams& c,
                                                          const RowTile& rows, const void* base,
                                                          const int64_t (&stride)[3]) {
  const int64_t sequence = c.page_bits == 0 ? rows.batch * stride[0] : 0;
  return reinterpret_cast<const unsigned char*>(static_cast<const T*>(base) + sequence +
                                                rows.kv_head * stride[1]);
}

// Starts to copy rows of keys or values, `dims` elements each; zeros for -1, and beyond `dims`.
// `page_bits` is 0 where the rows lie one after the other.
template <class C>
__device__ __forceinline__ void copy_rows(typename C::Tile to, const unsigned char* from,
                                          int32_t row_bytes, int64_t page_bytes, int page_bits,
                                          int dims, const int* rows) {
  int at[C::kKeys];  // first all of them: reads of shared memory would wait for the copies
  each_chunk<C, C::kKeys>([&](int i, int row, int) { at[i] = rows[row]; });
  each_chunk<C, C::kKeys>([&](int i, int row, int chunk) {
    int64_t page = 0;
    int place = max(at[i], 0);
    if (page_bits != 0) {
      page = (place >> page_bits) * page_bytes;
      place &= (1 << page_bits) - 1;
    }
    cp_async_16(to.at(row, chunk), from + page + int64_t{place} * row_bytes + chunk * 16,
                at[i] >= 0 && chunk * 8 < dims);
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
    find_rows(work.rows, p);
    ask_for_keys(work.keys, p, work.rows);
  }
  __syncthreads();
  if (rows.first_query >= p.call.Tq) return;
  work.runs.build(keys);
  const int first_masked = runs.first_masked();
  const int begin = static_cast<int>(int64_t{runs.n_tiles()} * rows.split / p.splits);
  const int end = static_cast<int>(int64_t{runs.n_tiles()} * (rows.split + 1) / p.splits);

  const auto& c = p.call;
  const unsigned char* const key = first_row<T>(c, rows, c.key, c.key_stride);
  const unsigned char* const value = first_row<T>(c, rows, c.value, c.value_stride);
  const int page_bits = static_cast<int>(c.page_bits);
  const int thread = threadIdx.x;
  const auto tokens_of = [&](int tile) { return tokens + (tile & 1) * C::kKeys; };
  // where the tokens lie in the cache: the tokens themselves where it has no pages
  const auto places_of = [&](int tile) {
    return page_bits == 0 ? tokens_of(tile)
                          : reinterpret_cast<int*>(memory + C::kTile.shared_bytes()) +
                                (tile & 1) * C::kKeys;
  };
  const auto find_place = [&](int tile) {
    if (thread >= C::kKeys || tile >= end) return -1;
    const int token = runs.token(keys, tile, thread);
    if (page_bits == 0) return token;
    tokens_of(tile)[thread] = token;  // read no more by the step that scored the tile before
    return row_in_pages(c, keys, token);
  };
  const auto keep_place = [&](int tile, int place) {
    if (thread < C::kKeys) places_of(tile)[thread] = place;
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
      copy_rows<C>(next_slot(filled), key, p.key_row_bytes, p.key_page_bytes, page_bits,
                   static_cast<int>(c.D), places_of(tile));
    cp_async_commit();
  };
  const auto copy_values = [&](int tile) {
    if (tile < end)
      copy_rows<C>(next_slot(filled), value, p.value_row_bytes, p.value_page_bytes, page_bits,
                   static_cast<int>(c.Dv), places_of(tile));
    cp_async_commit();
  };
  // the oldest copy has landed, for all threads, and all have left the step before
  const auto wait_for_slot = [&] {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
  };

  keep_place(begin, find_place(begin));
  keep_place(begin + 1, find_place(begin + 1));
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
    const int place = find_place(tile + 2);
    multiply_weights_value<C>(acc, weights, next_slot(used), first_key);
    keep_place(tile + 2, place);
  }
  softmax.finish();
  finish_rows<C>(p, rows, memory, acc, softmax, first_row, key_warp);
}

}  // namespace sparse_attn
