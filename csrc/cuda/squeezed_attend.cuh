// Attention over the kept runs of a clustered context and over a tail: one persistent kernel.
//
// The blocks of a fixed grid share the keys of all tiles of rows evenly, see
// squeezed_attend_share.cuh. A block goes through its share tile of rows by tile of rows; each is
// attended to as in block_sparse_attention.cuh, whose steps these are. What it has all keys of is
// written at once; what it shares with other blocks, at most two, it leaves as a part, and the last
// block to come joins the parts in their order.
#pragma once
#include "block_sparse_attention.cuh"
#include "squeezed_attend_share.cuh"

namespace sparse_attn {

struct SharedRows {  // in global memory, of one KV head
  const unsigned char *key, *value;
  int32_t key_bytes, value_bytes;  // of a row
};

// In shared memory: what one thread has found for all, whose registers are for scores.
struct SqueezedWork {
  Share share;
  RowTile rows;
  RunKeys keys;
  SharedRows sources[2];  // context, tail
};

template <class T>
__device__ __forceinline__ void find_source(SharedRows& source, const RowTile& rows,
                                            const void* key, const int64_t (&key_stride)[3],
                                            const void* value, const int64_t (&value_stride)[3]) {
  const auto first = [&](const void* x, const int64_t(&stride)[3]) {
    const T* const row = static_cast<const T*>(x) + rows.batch * stride[0];
    return reinterpret_cast<const unsigned char*>(row + rows.kv_head * stride[1]);
  };
  source.key = first(key, key_stride), source.value = first(value, value_stride);
  source.key_bytes = static_cast<int32_t>(sizeof(T) * key_stride[2]);
  source.value_bytes = static_cast<int32_t>(sizeof(T) * value_stride[2]);
}

// Starts to copy rows of `dims` elements; zeros where there is no token, and beyond `dims`.
template <class C>
__device__ __forceinline__ void copy_tokens(typename C::Tile to, const unsigned char* from,
                                            int32_t row_bytes, int dims, const int* tokens) {
  int token[C::kKeys];  // first all of them: reads of shared memory would wait for the copies
  each_chunk<C, C::kKeys>([&](int i, int row, int) { token[i] = tokens[row]; });
  each_chunk<C, C::kKeys>([&](int i, int row, int chunk) {
    cp_async_16(to.at(row, chunk), from + int64_t{max(token[i], 0)} * row_bytes + chunk * 16,
                token[i] >= 0 && chunk * 8 < dims);
  });
}

// -infinity where there is no token, and in the tail where it comes after the query.
template <class C>
__device__ __forceinline__ void hide_scores(typename C::Scores& s, const RunKeys& keys, bool tail,
                                            const RowTile& rows, const int* tokens, int first_row,
                                            int first_key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 16 * m + 8 * h + lane / 4;
      const int last = tail ? keys.shift + rows.query_of(row) : keys.n_tokens;
#pragma unroll
      for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = tokens[first_key + 8 * n + lane % 4 * 2 + i];
          if (token < 0 || token > last) s[m][n][2 * h + i] = -kInfinity;
        }
    }
}

// From the rows of the warps to the result, or to a part of it.
template <class C>
__device__ __forceinline__ void finish_share(const SqueezedAttendCudaParams& p,
                                             const SqueezedWork& work, int units,
                                             unsigned char* memory, const typename C::Output& acc,
                                             const OnlineSoftmax<C::kRowTiles>& softmax,
                                             int first_row, int key_warp) {
  const RowTile& rows = work.rows;
  const Share& share = work.share;
  const int n_rows = p.heads * p.queries, dims = static_cast<int>(p.call.Dv);
  const bool begins = share.unit == share.first_unit;
  const bool whole = begins && share.first_unit + units <= share.end;
  if (C::kKeyWarps == 1 && whole) return store_rows<C>(p, rows, acc, softmax, first_row);

  const int first = share.block_of(share.first_unit);
  const int blocks = share.block_of(share.first_unit + units - 1) - first + 1;
  const int64_t value_step = int64_t{n_rows} * dims, stat_step = 2 * n_rows, place = 2 * first;
  const Parts parts{p.part_values + place * value_step, p.part_stats + place * stat_step,
                    value_step, stat_step, dims, blocks, 1, 2};
  const int part = begins ? 1 : 2 * (static_cast<int>(blockIdx.x) - first);
  if (C::kKeyWarps == 1) {
    store_part<C>(parts, part, n_rows, dims, acc, softmax, first_row);
  } else {
    __syncthreads();  // the slots of keys and values have served
    auto* values = reinterpret_cast<float*>(memory);
    const Parts warps{values, values + C::kKeyWarps * C::kRows * C::kDim, C::kRows * C::kDim,
                      2 * C::kRows, C::kDim, C::kKeyWarps};
    store_part<C>(warps, key_warp, n_rows, dims, acc, softmax, first_row);
    __syncthreads();
    if (whole) return join_rows<C>(p, rows, warps);
    join_into_part<C>(warps, parts, part, n_rows, dims);
  }
  if (last_block(p.done + share.item, blocks)) join_rows<C>(p, rows, parts);
}

// The block's part of the keys of one tile of rows.
template <class C>
__device__ __forceinline__ void attend_to_rows(const SqueezedAttendCudaParams& p,
                                               const SqueezedWork& work, unsigned char* memory,
                                               int* tokens) {
  using T = typename C::T;
  const RowTile& rows = work.rows;
  const RunKeys& keys = work.keys;
  const auto& c = p.call;
  const typename C::Tile query{memory};
  unsigned char* const slots = memory + C::kQueryBytes;
  constexpr int kUnitTiles = kUnitKeys / C::kKeys;
  const int units = keys.units<C::kKeys>(), first_tail = keys.kept_tiles<C::kKeys>();
  const Share& share = work.share;
  const int begin = static_cast<int>(share.unit - share.first_unit) * kUnitTiles;
  const int stop = static_cast<int>(min(share.end - share.first_unit, int64_t{units}));
  const int end = min(stop * kUnitTiles, keys.tiles<C::kKeys>());

  const int thread = threadIdx.x;
  int run = -1;
  const auto tokens_of = [&](int tile) { return tokens + (tile & 1) * C::kKeys; };
  const auto find_token = [&](int tile) {
    return thread < C::kKeys && tile < end ? keys.token<C::kKeys>(tile, thread, run) : -1;
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
    const SharedRows& from = work.sources[tile >= first_tail];
    if (tile < end)
      copy_tokens<C>(next_slot(filled), from.key, from.key_bytes, static_cast<int>(c.D),
                     tokens_of(tile));
    cp_async_commit();
  };
  const auto copy_values = [&](int tile) {
    const SharedRows& from = work.sources[tile >= first_tail];
    if (tile < end)
      copy_tokens<C>(next_slot(filled), from.value, from.value_bytes, static_cast<int>(c.Dv),
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
      if (tile >= first_tail - 1)
        hide_scores<C>(scores, keys, tile >= first_tail, rows, tokens_of(tile), first_row,
                       first_key);
      softmax.template add<T>(scores, acc, weights);
    }
    wait_for_slot();
    copy_values(tile + 1);
    // found here, kept after the products: nobody waits for the runs
    const int token = find_token(tile + 2);
    multiply_weights_value<C>(acc, weights, next_slot(used), first_key);
    keep_token(tile + 2, token);
  }
  softmax.finish();
  finish_share<C>(p, work, units, memory, acc, softmax, first_row, key_warp);
}

template <class T, int kDim, int kRows>
__global__ void __launch_bounds__(AttentionConfig<T, kDim, kRows>::kThreads, 1)
    squeezed_attend_kernel(const __grid_constant__ SqueezedAttendCudaParams p) {
  using C = AttentionConfig<T, kDim, kRows>;
  SA_SHARED_MEMORY(memory);
  int* const tokens = reinterpret_cast<int*>(memory + C::kQueryBytes + C::kStages * C::kSlotBytes);
  auto& work = *reinterpret_cast<SqueezedWork*>(tokens + 2 * C::kKeys);
  static_assert(sizeof(SqueezedWork) <= AttentionTile::kWorkBytes);

  const auto& c = p.call;
  find_share<C::kKeys, C::kThreads>(work.share, p, reinterpret_cast<int64_t*>(memory));
  while (work.share.unit < work.share.end) {
    if (threadIdx.x == 0) {
      find_keys(work.keys, p, work.share.item);
      find_rows(work.rows, p, work.share.item);
      find_source<T>(work.sources[0], work.rows, c.key, c.key_stride, c.value, c.value_stride);
      find_source<T>(work.sources[1], work.rows, c.tail_key, c.tail_key_stride, c.tail_value,
                     c.tail_value_stride);
    }
    __syncthreads();
    attend_to_rows<C>(p, work, memory, tokens);
    __syncthreads();  // all have left this tile of rows
    if (threadIdx.x == 0) {
      Share& share = work.share;
      share.unit = share.first_unit += work.keys.units<C::kKeys>();
      ++share.item;
    }
    __syncthreads();
  }
}

}  // namespace sparse_attn
