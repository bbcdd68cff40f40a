// How a block of threads finds the fewest values, largest first, that reach a target: a search by
// histograms of their bits, a byte at a time. Sums are of integers, so no order of threads shows.
#pragma once
#include "device.cuh"

namespace sparse_attn {

// Takes the values whose bits are above, and the first `equal` of those with just these bits.
// Bits of non-negative floats are ordered as they are; negative values are never taken.
struct Threshold {
  uint32_t bits;
  int equal;
};

constexpr int kAllEqual = 0x7fffffff;
constexpr unsigned long long kUnit = 1ull << 48;  // of masses in fixed point, at most 2^15 of them

struct ThresholdShared {
  unsigned long long bins[256], above;
  int bin;
};

__device__ __forceinline__ unsigned long long fixed_point(float x) {
  return static_cast<unsigned long long>(fmaxf(x, 0.f) * static_cast<float>(kUnit));
}

// Warp 0: the largest bin with which `above` and the bins from it on reach the target, or -1.
__device__ __forceinline__ void find_bin(ThresholdShared& s, unsigned long long above,
                                         unsigned long long target) {
  const int lane = threadIdx.x, last = 255 - 8 * lane;  // a lane's bins, in descending order
  unsigned long long sum = 0;
  for (int k = 0; k < 8; ++k) sum += s.bins[last - k];
  unsigned long long before = sum;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const unsigned long long other = __shfl_up_sync(0xffffffff, before, lanes);
    if (lane >= lanes) before += other;
  }
  const uint32_t reached = __ballot_sync(0xffffffff, above + before >= target);
  before += above - sum;
  if (reached == 0) {
    if (lane == 0) s.bin = -1;
  } else if (lane == __ffs(reached) - 1) {
    int bin = last;
    while (before + s.bins[bin] < target) before += s.bins[bin--];
    s.bin = bin, s.above = before;
  }
}

// The threshold of n values in global memory; `target` counts values or sums them in fixed point.
// If all of them do not reach it, it takes all.
template <int kThreads, bool kByCount>
__device__ __forceinline__ Threshold find_threshold(const float* x, int n,
                                                    unsigned long long target,
                                                    ThresholdShared& s) {
  if (target == 0) return {0xffffffff, 0};
  uint32_t prefix = 0;
  unsigned long long above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t bits = __float_as_uint(x[i]);
      const bool alike = shift == 24 || bits >> (shift + 8) == prefix >> (shift + 8);
      if (bits >> 31 == 0 && alike)
        atomicAdd(&s.bins[bits >> shift & 255], kByCount ? 1ull : fixed_point(x[i]));
    }
    __syncthreads();
    if (threadIdx.x < 32) find_bin(s, above, target);
    __syncthreads();
    if (s.bin < 0) return {0, kAllEqual};
    prefix |= static_cast<uint32_t>(s.bin) << shift, above = s.above;
  }
  // the bin reached the target, so its values are not 0
  const unsigned long long missing = target - above;
  const unsigned long long each = kByCount ? 1 : fixed_point(__uint_as_float(prefix));
  return {prefix, static_cast<int>((missing + each - 1) / each)};
}

// Of the threads before this one, how many have x; `total` counts all. `counts` [kThreads / 32].
template <int kThreads>
__device__ __forceinline__ int rank_in_block(bool x, int* counts, int& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t all = __ballot_sync(0xffffffff, x);
  __syncthreads();  // the call before may still read
  if (lane == 0) counts[warp] = __popc(all);
  __syncthreads();
  int rank = __popc(all & ((1u << lane) - 1));
  total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) rank += counts[i];
    total += counts[i];
  }
  return rank;
}

// Whether a threshold takes x; threads hold values in ascending order of place, `seen` counts those
// equal to the threshold so far.
template <int kThreads>
__device__ __forceinline__ bool takes(const Threshold& threshold, float x, int& seen, int* counts) {
  const uint32_t bits = __float_as_uint(x);
  const bool positive = bits >> 31 == 0;
  int total;
  const int place = seen + rank_in_block<kThreads>(bits == threshold.bits, counts, total);
  seen += total;
  return positive && (bits > threshold.bits || (bits == threshold.bits && place < threshold.equal));
}

// The same in every thread, whatever their order; `partial` [kThreads / 32].
template <int kThreads, class Combine>
__device__ __forceinline__ float combine_block(float x, float* partial, Combine combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2)
    x = combine(x, __shfl_xor_sync(0xffffffff, x, lanes));
  __syncthreads();  // the call before may still read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
  for (int i = 1; i < kThreads / 32; ++i) x = combine(x, partial[i]);
  return x;
}

template <int kThreads>
__device__ __forceinline__ float sum_block(float x, float* partial) {
  return combine_block<kThreads>(x, partial, [](float a, float b) { return a + b; });
}

template <int kThreads>
__device__ __forceinline__ float max_block(float x, float* partial) {
  return combine_block<kThreads>(x, partial, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace sparse_attn
