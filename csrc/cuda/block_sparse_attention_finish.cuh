// From what the warps of a block have summed up to the result: written at once, or joined with what
// other warps and blocks found over other keys.
#pragma once
#include "block_sparse_attention_rows.cuh"
#include "join_parts.cuh"
#include "online_softmax.cuh"

namespace sparse_attn {

// Calls `f(row, m, h)` for the rows of a warp that this lane has a part of.
template <class C, class F>
__device__ __forceinline__ void each_row(int first_row, F f) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(first_row + 16 * m + 8 * h + threadIdx.x % 32 / 4, m, h);
}

// Writes the rows of a warp, divided by their denominators.
template <class C, class P>
__device__ __forceinline__ void store_rows(const P& p, const RowTile& rows,
                                           const typename C::Output& acc,
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
template <class C, class P>
__device__ __forceinline__ void join_rows(const P& p, const RowTile& rows, const Parts& parts) {
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

}  // namespace sparse_attn
