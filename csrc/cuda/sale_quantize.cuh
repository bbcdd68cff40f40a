// sale_quantize: sparse_attn/reference/sale_quantize.py says what, to the bit.
//
// The mean is summed in chunks of tokens, in a fixed order. Then a block of threads takes 64 tokens
// of a head, whole groups of every kind; it reads them twice, the second time from a cache.
#pragma once
#include "sale_quantize_params.h"
#include "device.cuh"

namespace sparse_attn {

template <class T>
__device__ __forceinline__ const T* head_of(const SaleQuantizeCudaParams& p, int64_t head) {
  return static_cast<const T*>(p.x) + head / p.H * p.x_stride[0] + head % p.H * p.x_stride[1];
}

// Sums of a chunk's tokens.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sale_sum_kernel(const __grid_constant__ SaleQuantizeCudaParams p) {
  SA_SHARED_MEMORY(memory);
  auto* const partial = reinterpret_cast<float*>(memory);  // [lanes, D]
  const int64_t head = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const int D = static_cast<int>(p.D), pieces = D / 8, lanes = kSumThreads / pieces;
  const int piece = threadIdx.x % pieces, lane = threadIdx.x / pieces;
  const int64_t end = min((chunk + 1) * kChunkTokens, p.T);
  if (lane < lanes) {
    const T* const x = head_of<T>(p, head) + piece * 8;
    float sum[8] = {};
    for (int64_t i = chunk * kChunkTokens + lane; i < end; i += lanes) {
      const auto part = *reinterpret_cast<const Pack<T, 8>*>(x + i * p.x_stride[2]);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += to_float(part[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) partial[lane * D + piece * 8 + e] = sum[e];
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += kSumThreads) {
    float sum = 0;
    for (int i = 0; i < lanes; ++i) sum += partial[i * D + d];
    p.partial[blockIdx.x * p.D + d] = sum;
  }
}

// The mean of a head where none was given, and the floor of its groups.
__global__ void __launch_bounds__(kSumThreads)
    sale_mean_kernel(const __grid_constant__ SaleQuantizeCudaParams p) {
  constexpr float kFloor = 1.f / 65536;
  SA_SHARED_MEMORY(memory);
  auto& most = *reinterpret_cast<int*>(memory);
  const int64_t head = blockIdx.x;
  float* const center = p.center + head * p.D;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  for (int64_t d = threadIdx.x; d < p.D; d += kSumThreads) {
    if (!p.mean_given) {
      float sum = 0;
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk)
        sum += p.partial[(head * p.chunks + chunk) * p.D + d];
      center[d] = sum / static_cast<float>(p.T);
    }
    atomicMax(&most, __float_as_int(center[d] * kFloor) & 0x7fffffff);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.floor[head] = __int_as_float(most);
}

// The place of a token's group among those of the tile's tokens.
__device__ __forceinline__ int group_of(SaleGroup group, int block, int token) {
  if (group == SaleGroup::query) return token / 16 * 8 + token % 8;
  return token / block * 4 + token % 8 / 2;
}

// Codes and steps of kCodeTokens tokens. A token's lanes have eight of its channels each: four in
// the lower half, and those that share their bytes.
template <class T>
__global__ void __launch_bounds__(kCodeThreads)
    sale_code_kernel(const __grid_constant__ SaleQuantizeCudaParams p) {
  constexpr float kSmallest = 0x1p-58f, kLargestFinite = 3.402823466e+38f;
  SA_SHARED_MEMORY(memory);
  auto* const most = reinterpret_cast<int*>(memory);  // by group
  auto* const inverse = reinterpret_cast<float*>(most + kCodeTokens);
  const int64_t tiles = (p.T + kCodeTokens - 1) / kCodeTokens;
  const int64_t head = blockIdx.x / tiles, first = blockIdx.x % tiles * kCodeTokens;
  const int tokens = static_cast<int>(min(p.T - first, int64_t{kCodeTokens}));
  const int half = static_cast<int>(p.D / 2), lanes = half / 4, block = static_cast<int>(p.block);
  const int at_once = 32 / lanes * (kCodeThreads / 32);  // a token's lanes are of one warp
  const int warp_lane = threadIdx.x % 32, lane = warp_lane % lanes;
  const int own = warp_lane / lanes < 32 / lanes
                      ? threadIdx.x / 32 * (32 / lanes) + warp_lane / lanes : kCodeTokens;
  const T* const x = head_of<T>(p, head) + first * p.x_stride[2] + lane * 4;
  const float* const center = p.center + head * p.D + lane * 4;
  // the lane's channels of a token, less the mean
  const auto read = [&](int token, float (&low)[4], float (&high)[4]) {
    const auto a = *reinterpret_cast<const Pack<T, 4>*>(x + token * p.x_stride[2]);
    const auto b = *reinterpret_cast<const Pack<T, 4>*>(x + token * p.x_stride[2] + half);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      low[e] = __fsub_rn(to_float(a[e]), center[e]);
      high[e] = __fsub_rn(to_float(b[e]), center[half + e]);
    }
  };
  const int last_group = static_cast<int>(group_of(p.group, block, kCodeTokens - 1));
  if (threadIdx.x < kCodeTokens) most[threadIdx.x] = __float_as_int(p.floor[head]);
  __syncthreads();
  for (int token = own; token < tokens; token += at_once) {
    float low[4], high[4];
    read(token, low, high);
    int size = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      size = max(size, __float_as_int(low[e]) & 0x7fffffff);
      size = max(size, __float_as_int(high[e]) & 0x7fffffff);
    }
    atomicMax(most + group_of(p.group, block, token), size);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) <= last_group) {
    const int group = threadIdx.x;
    const float m = __int_as_float(most[group]);
    float step = __fdiv_rn(m, 7.f), scale = __fdiv_rn(7.f, m);
    if (!(m <= kLargestFinite)) step = __int_as_float(0x7fc00000), scale = 0;
    if (m < kSmallest) step = 0, scale = 0;
    inverse[group] = scale;
    const int64_t place = first / kCodeTokens * (last_group + 1) + group;
    if (place < p.groups) p.step[head * p.groups + place] = step;
  }
  __syncthreads();
  for (int token = own; token < tokens; token += at_once) {
    float low[4], high[4];
    read(token, low, high);
    const float scale = inverse[group_of(p.group, block, token)];
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // 0 of NaN
      codes |= (__float2int_rn(__fmul_rn(low[e], scale)) & 15u) << 8 * e;
      codes |= (__float2int_rn(__fmul_rn(high[e], scale)) & 15u) << (8 * e + 4);
    }
    uint8_t* const to = p.packed + (head * p.T + first + token) * half + lane * 4;
    *reinterpret_cast<uint32_t*>(to) = codes;
  }
}

}  // namespace sparse_attn
