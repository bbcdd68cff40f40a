// Rows of 16-bit elements in shared memory.
#pragma once
#include "sm80.cuh"

namespace sparse_attn {

// Chunks of 16 bytes are permuted within their row, so that the eight rows of a matrix fragment
// come from different banks. Rows that are a multiple of eight apart have the same permutation.
template <int kDim>
struct SharedTile {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kRowBytes = kDim * 2;

  unsigned char* base;

  __device__ static int permuted(int row, int chunk) {
    return chunk ^ (kDim % 64 == 0 ? row & 7 : row >> 1 & 3);
  }

  __device__ unsigned char* at(int row, int chunk) const {
    return base + row * kRowBytes + permuted(row, chunk) * 16;
  }

  // Where a lane reads fragments: some rows below, a multiple of 8, and some chunks to the right,
  // a multiple of 2, of its first.
  struct Lane {
    unsigned char* row;
    int chunk;

    __device__ unsigned char* at(int rows, int chunks) const {
      return row + rows * kRowBytes + (chunk ^ chunks) * 16;
    }
  };

  __device__ Lane lane(int row, int first_chunk) const {
    return {base + row * kRowBytes, permuted(row, first_chunk)};
  }
};

}  // namespace sparse_attn
