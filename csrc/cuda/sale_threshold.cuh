// sale_threshold: attention over the reference region, of which only the sums are wanted, and the
// product of each query with the mean of the keys.
//
// A block of threads owns up to 64 queries of one query block. Its keys come in the tiles of
// block_sparse_attention, one being copied while the other is multiplied.
#pragma once
#include "block_sparse_attention.cuh"
#include "sale_region.cuh"
#include "sale_threshold_params.h"

namespace sparse_attn {

template <class T, int kDim>
__global__ void __launch_bounds__(128, 2)
    sale_threshold_kernel(const __grid_constant__ SaleThresholdCudaParams p) {
  using C = AttentionConfig<T, kDim, kBarRows>;
  constexpr float kLog2E = 1.44269504088896341f, kDenseBelow = 1e-5f;
  SA_SHARED_MEMORY(memory);
  const typename C::Tile queries{memory};
  unsigned char* const slots = memory + C::kQueryBytes;
  int* const tokens = reinterpret_cast<int*>(slots + 2 * C::kSlotBytes);  // of two tiles
  float* const sums = reinterpret_cast<float*>(tokens + 2 * C::kKeys);    // of rows

  const int parts = static_cast<int>(p.parts), q_block = static_cast<int>(p.q_block);
  const int index = static_cast<int>(blockIdx.x), part = index % parts, rest = index / parts;
  const int query_block = rest % static_cast<int>(p.Mq), head = rest / static_cast<int>(p.Mq);
  const int Hq = static_cast<int>(p.Hq), batch = head / Hq;
  const int kv = head % Hq / (Hq / static_cast<int>(p.Hkv));
  const int first = query_block * q_block + part * kBarRows;
  const int rows = min(min(q_block - part * kBarRows, kBarRows), static_cast<int>(p.Tq) - first);
  if (rows <= 0) return;
  const T* const query = static_cast<const T*>(p.query) + batch * p.query_stride[0] +
                         head % Hq * p.query_stride[1] + first * p.query_stride[2];
  const T* const key =
      static_cast<const T*>(p.key) + batch * p.key_stride[0] + kv * p.key_stride[1];

  // the keys of the region one behind the other, up to the last query's
  const SaleRegion region(p, query_block);
  const int kv_block = static_cast<int>(p.kv_block), thread = threadIdx.x;
  const int position = static_cast<int>(p.Tk - p.Tq) + first;  // of the first query
  const int sink = region.sink * kv_block, gap = (region.local - region.sink) * kv_block;
  const int keys = max(min(region.seen * kv_block, position + rows) - gap, 0);
  const auto token_at = [&](int place) { return place < sink ? place : place + gap; };
  const int tiles = (keys + C::kKeys - 1) / C::kKeys;
  const auto slot = [&](int tile) {
    return typename C::Tile{slots + (tile & 1) * C::kSlotBytes};
  };
  const auto keep_tokens = [&](int tile) {
    const int place = tile * C::kKeys + thread;
    if (thread < C::kKeys)
      tokens[(tile & 1) * C::kKeys + thread] = place < keys ? token_at(place) : -1;
  };
  const auto copy_keys = [&](int tile) {
    copy_rows<C>(slot(tile), reinterpret_cast<const unsigned char*>(key),
                 static_cast<int32_t>(2 * p.key_stride[2]), /*page_bytes=*/0, /*page_bits=*/0,
                 static_cast<int>(p.D), tokens + (tile & 1) * C::kKeys);
  };
  each_chunk<C, C::kRows>([&](int, int row, int chunk) {
    const bool valid = row < rows && chunk * 8 < p.D;
    cp_async_16(queries.at(row, chunk), query + (valid ? row * p.query_stride[2] + chunk * 8 : 0),
                valid);
  });
  keep_tokens(0);
  __syncthreads();
  if (tiles > 0) copy_keys(0);
  cp_async_commit();

  const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  OnlineSoftmax<1> softmax(fmaxf(p.scale, 1e-30f) * kLog2E);
  for (int tile = 0; tile < tiles; ++tile) {
    keep_tokens(tile + 1);
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tiles) copy_keys(tile + 1);
    cp_async_commit();
    typename C::Scores scores;
    multiply_query_key<C>(scores, queries, slot(tile), warp * 16, 0);
#pragma unroll
    for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = tile * C::kKeys + 8 * n + 2 * t + i % 2;
        const bool sees = place < keys && token_at(place) <= position + warp * 16 + g + i / 2 * 8;
        if (!sees) scores[0][n][i] = -kInfinity;
      }
    float none[1][1][4] = {};
    typename C::Weights weights;
    softmax.template add<T>(scores, none, weights);
  }
  softmax.finish();
  cp_async_wait<0>();  // of the queries, where there are no keys
  if (t == 0)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      sums[warp * 16 + g + 8 * h] = log_sum(softmax.top[0][h], softmax.sum[0][h]);
  __syncthreads();

  // two threads per row, every other 8 channels each
  const int row = thread / 2;
  const float* const mean = p.key_mean + (batch * p.Hkv + kv) * p.D;
  float product = 0;
  for (int chunk = thread % 2; chunk * 8 < p.D; chunk += 2) {
    const auto x = *reinterpret_cast<const Pack<T, 8>*>(queries.at(row, chunk));
#pragma unroll
    for (int e = 0; e < 8; ++e) product += to_float(x[e]) * mean[chunk * 8 + e];
  }
  product += __shfl_xor_sync(0xffffffff, product, 1);
  if (thread % 2 != 0 || row >= rows) return;
  const float threshold = p.threshold[head % Hq];
  const float bar = (sums[row] + logf(threshold)) / p.scale - product;
  p.theta[head * p.Tq + first + row] = threshold < kDenseBelow ? -kInfinity : bar;
}

}  // namespace sparse_attn
