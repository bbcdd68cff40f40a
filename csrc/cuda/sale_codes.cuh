// 4-bit codes as operands of the tensor cores.
//
// A row of codes is read in words of eight: two channels in each byte, low and high. The dot
// product does not care for the order of channels, so a lane takes whole words as they lie in
// memory, the same of queries and keys. Up to sm_89 a word is an operand. Later GPUs have no 4-bit
// product: there a word becomes two of 8-bit integers, low and high. Codes of keys are widened to
// code + 8, in fewer instructions than it takes to extend the sign; what that adds to a row of
// products, 8 times the sum of the query's codes, is `excess`.
#pragma once
#include "sm80.cuh"

namespace sparse_attn {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kNativeInt4 = true;
#else
constexpr bool kNativeInt4 = false;
#endif

// Code + 8 of the eight codes of a word, by low and high nibbles.
__device__ __forceinline__ uint32_t widened_low(uint32_t word) {
  return (word & 0x0f0f0f0f) ^ 0x08080808;
}
__device__ __forceinline__ uint32_t widened_high(uint32_t word) { return widened_low(word >> 4); }

// 0 .. 15 in each byte less 8.
__device__ __forceinline__ uint32_t less_eight(uint32_t x) {
  return ((x | 0x80808080) - 0x08080808) ^ 0x80808080;
}

// Where the words of a row lie whose lane has t = lane % 4: kWords for each of four lanes. Of more
// than four a lane takes every other 16 bytes, so that eight lanes cover all banks.
template <int kWords>
__device__ __forceinline__ int word_place(int t, int i) {
  return kWords <= 4 ? t * kWords + i : (i / 4 * 4 + t) * 4 + i % 4;
}

// The codes of a tile of 16 queries as operands, of which a lane has rows lane / 4 and 8 below.
template <int kWords, bool kInt4>
struct QueryCodes {
  static constexpr int kSteps = kInt4 ? kWords / 2 : kWords;
  uint32_t a[kSteps][4];

  // `sum`: the lane's part of the sum of each row's codes; 0 where nothing is in excess.
  __device__ __forceinline__ void set(const uint32_t (&upper)[kWords],
                                      const uint32_t (&lower)[kWords], int (&sum)[2]) {
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kInt4) {
        a[i][0] = upper[2 * i], a[i][1] = lower[2 * i];
        a[i][2] = upper[2 * i + 1], a[i][3] = lower[2 * i + 1];
      } else {
        a[i][0] = less_eight(widened_low(upper[i])), a[i][1] = less_eight(widened_low(lower[i]));
        a[i][2] = less_eight(widened_high(upper[i])), a[i][3] = less_eight(widened_high(lower[i]));
#pragma unroll
        for (int r = 0; r < 4; ++r)
          sum[r % 2] = __dp4a(static_cast<int>(a[i][r]), 0x01010101, sum[r % 2]);
      }
    }
  }
};

// The codes of eight keys, of which a lane has key lane / 4.
template <int kWords, bool kInt4>
struct KeyCodes {
  static constexpr int kSteps = kInt4 ? kWords / 2 : kWords;
  uint32_t b[kSteps][2];

  __device__ __forceinline__ explicit KeyCodes(const uint32_t (&words)[kWords]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kInt4)
        b[i][0] = words[2 * i], b[i][1] = words[2 * i + 1];
      else
        b[i][0] = widened_low(words[i]), b[i][1] = widened_high(words[i]);
    }
  }
};

// d [16, 8] += products of queries and keys, and what is in excess.
template <int kWords, bool kInt4>
__device__ __forceinline__ void add_products(int (&d)[4], const QueryCodes<kWords, kInt4>& query,
                                             const KeyCodes<kWords, kInt4>& key) {
#pragma unroll
  for (int i = 0; i < QueryCodes<kWords, kInt4>::kSteps; ++i) {
    if constexpr (kInt4)
      mma_m16n8k64_s4(d, query.a[i], key.b[i][0], key.b[i][1]);
    else
      mma_m16n8k32_s8u8(d, query.a[i], key.b[i][0], key.b[i][1]);
  }
}

}  // namespace sparse_attn
