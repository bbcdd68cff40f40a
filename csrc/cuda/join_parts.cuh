// Joins what several warps or blocks found for the same rows over disjoint keys.
#pragma once
#include "sm80.cuh"

namespace sparse_attn {

// Numerators, references and denominators of several parts of the same rows.
struct Parts {
  float* values;  // part i, row r, column c at place(i) * value_step + r * row_step + c
  float* stats;   // part i, row r at place(i) * stat_step + 2 r: reference, denominator
  int64_t value_step, stat_step, row_step;
  int n;
  int first = 0, every = 1;  // place of the first part, and from there on of each

  __device__ int64_t place(int i) const { return i == 0 ? first : int64_t{i} * every; }
};

// One row of the result, spread over a warp: lane l has columns 4 (l + 32 v) and the next three.
template <int kDim>
struct JoinedRow {
  static constexpr int kVectors = (kDim + 127) / 128;

  float reference, sum;
  float values[kVectors][4];

  // In the order of the parts, by a whole warp: the same bits each time.
  __device__ void join(const Parts& parts, int row, int dims) {
    const int lane = threadIdx.x % 32;
    const auto stat = [&](int i) {
      return parts.stats + parts.place(i) * parts.stat_step + 2 * row;
    };
    reference = -kInfinity;
    for (int i = lane; i < parts.n; i += 32) reference = fmaxf(reference, stat(i)[0]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      reference = fmaxf(reference, __shfl_xor_sync(0xffffffff, reference, step));
    sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[v][j] = 0;
    for (int first = 0; first < parts.n; first += 32) {
      const int mine = first + lane;
      // no key in any part: every reference is -infinity
      float weight = 0, share = 0;
      if (mine < parts.n && reference != -kInfinity) {
        weight = exp2_approx(stat(mine)[0] - reference);
        share = weight * stat(mine)[1];
      }
      const int n = min(32, parts.n - first);
      for (int i = 0; i < n; ++i) {
        const float w = __shfl_sync(0xffffffff, weight, i);
        sum += __shfl_sync(0xffffffff, share, i);
        const float* from =
            parts.values + parts.place(first + i) * parts.value_step + row * parts.row_step;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = 4 * (lane + 32 * v);
          if (column >= dims) continue;
          const float4 x = *reinterpret_cast<const float4*>(from + column);
          values[v][0] += w * x.x, values[v][1] += w * x.y;
          values[v][2] += w * x.z, values[v][3] += w * x.w;
        }
      }
    }
  }

  // Calls `store(column, four values)` for the columns of the lane.
  template <class F>
  __device__ void each_vector(int dims, F store) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (4 * (lane + 32 * v) < dims) store(4 * (lane + 32 * v), values[v]);
  }
};

}  // namespace sparse_attn
