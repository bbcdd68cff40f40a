// How a block of threads keeps the largest of a list of scores in shared memory: radix select, then
// a compaction that preserves their order. Of equal scores the first stay.
#pragma once
#include "device.cuh"

namespace sparse_attn {

constexpr int kNoCandidate = -0x7fffffff - 1;  // the score of a place without a candidate

// Scores as integers of the same order. NaN is like -infinity, -0 like 0.
__device__ __forceinline__ int ordered(float x) {
  const uint32_t bits = __float_as_uint(fmaxf(x, -kInfinity) + 0.f);
  return static_cast<int>(bits ^ (bits >> 31 ? 0x7fffffffu : 0u));
}

struct TopKShared {
  int bins[256];
  int counts[32];  // by warp, in two halves
  int bin, above, in_bin, unused;
};

// Takes what is more than `bits`, and the first `equal` of what is equal.
struct TopK {
  uint32_t bits;
  int equal;
};

__device__ __forceinline__ uint32_t unsigned_order(int ordered) {
  return static_cast<uint32_t>(ordered) ^ 0x80000000u;
}

// Warp 0: the largest bin with which `above` and the bins from it on reach `target`, or -1.
__device__ __forceinline__ void find_top_bin(TopKShared& s, int above, int target) {
  const int lane = threadIdx.x, last = 255 - 8 * lane;  // a lane's bins, in descending order
  int count[8], sum = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) sum += count[k] = s.bins[last - k];
  int before = sum;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(0xffffffff, before, lanes);
    if (lane >= lanes) before += other;
  }
  const uint32_t reached = __ballot_sync(0xffffffff, above + before >= target);
  before += above - sum;
  if (reached == 0) {
    if (lane == 0) s.bin = -1;
  } else if (lane == __ffs(reached) - 1) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (before + count[k] >= target) {
        s.bin = last - k, s.above = before, s.in_bin = count[k];
        break;
      }
      before += count[k];
    }
  }
}

// What takes the `keep` largest of n, all candidates if there are no more. Begins and ends with a
// barrier.
__device__ __forceinline__ TopK find_top(const int* scores, int n, int keep, TopKShared& s) {
  uint32_t prefix = 0;
  int above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) s.bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t bits = unsigned_order(scores[i]);
      const bool alike = shift == 24 || bits >> (shift + 8) == prefix >> (shift + 8);
      if (bits != 0 && alike) atomicAdd(&s.bins[bits >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_top_bin(s, above, keep);
    __syncthreads();
    if (s.bin < 0) return {0, 0};
    prefix |= static_cast<uint32_t>(s.bin) << shift;
    above = s.above;
    // the whole bin is wanted: the bits below need not be known
    if (above + s.in_bin == keep) return {max(prefix, 1u) - 1, 0};
  }
  return {prefix, keep - above};
}

// Of the threads before this one, how many have a, in the low half, and b, in the high; `total`
// counts all. Two barriers, the second after every thread has arrived.
__device__ __forceinline__ uint32_t rank_two(bool a, bool b, int* counts, uint32_t& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t with_a = __ballot_sync(0xffffffff, a), with_b = __ballot_sync(0xffffffff, b);
  __syncthreads();  // the call before may still read
  if (lane == 0) counts[warp] = __popc(with_a) | __popc(with_b) << 16;
  __syncthreads();
  const uint32_t before = (1u << lane) - 1;
  uint32_t rank = __popc(with_a & before) | __popc(with_b & before) << 16;
  total = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) {
    if (i < warp) rank += static_cast<uint32_t>(counts[i]);
    total += static_cast<uint32_t>(counts[i]);
  }
  return rank;
}

// Calls store(place, load(i), score) for each candidate taken, places in the order of i; returns
// their number. What is loaded may lie where it is stored, at the same index or below.
template <class Load, class Store>
__device__ __forceinline__ int compact(const int* scores, int n, const TopK& top, TopKShared& s,
                                       Load load, Store store) {
  int above_before = 0, same_before = 0;
  for (int begin = 0; begin < n; begin += blockDim.x) {
    const int i = begin + static_cast<int>(threadIdx.x);
    const int score = i < n ? scores[i] : kNoCandidate;
    const uint32_t bits = unsigned_order(score);
    const bool is_above = bits > top.bits, same = bits == top.bits && bits != 0;
    const auto item = load(min(i, n - 1));
    uint32_t total;
    const uint32_t rank = rank_two(is_above, same, s.counts, total);
    const int n_same = same_before + static_cast<int>(rank >> 16);
    const int place = above_before + static_cast<int>(rank & 0xffff) + min(n_same, top.equal);
    if (is_above || (same && n_same < top.equal)) store(place, item, score);
    above_before += static_cast<int>(total & 0xffff);
    same_before += static_cast<int>(total >> 16);
  }
  return above_before + min(same_before, top.equal);
}

}  // namespace sparse_attn
