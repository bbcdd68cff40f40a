// Rows of 16-bit elements in shared memory.
#pragma once
#include "sm80.cuh"

namespace sparse_attn {

// Chunks of 16 bytes are permuted within their row, so that the eight rows of a matrix fragment
// come from different banks.
template <int kDim>
struct SharedTile {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kRowBytes = kDim * 2;

  unsigned char* base;

  __device__ __forceinline__ unsigned char* at(int row, int chunk) const {
    const int permuted = chunk ^ (kDim % 64 == 0 ? row & 7 : row >> 1 & 3);
    return base + row * kRowBytes + permuted * 16;
  }
};

}  // namespace sparse_attn
