// Softmax of rows whose scores arrive tile by tile.
#pragma once
#include "sm80.cuh"

namespace sparse_attn {

// A warp holds kRowTiles x 16 rows in the layout of matrix accumulators: lane l has rows l / 4 and
// l / 4 + 8 of each 16 and, of 8 columns, 2 (l % 4) and the next; the lanes of a quad share rows.
//
// A weight is 2^(scale score - reference). The reference is the largest scaled score at the time it
// was last moved, which is only when a row has outgrown it by 2^kSlack: numerator and denominator
// share it, so the result is exact, and accumulators are hardly ever rescaled.
template <int kRowTiles>
struct OnlineSoftmax {
  static constexpr float kSlack = 8;

  float scale;              // of scores, times log2(e); positive
  float top[kRowTiles][2];  // the reference, not scaled; -infinity: no key seen
  float sum[kRowTiles][2];  // the lane's share of the denominator

  __device__ explicit OnlineSoftmax(float scale) : scale(scale) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) top[m][h] = -kInfinity, sum[m][h] = 0;
  }

  // A row without a key has only scores of -infinity: any finite reference gives weights of 0.
  __device__ static float scaled(float top, float scale) {
    return top == -kInfinity ? 0 : top * scale;
  }

  // Turns the scores of a tile into weights, fragments for the product with the values, after
  // bringing `acc`, the sum of weighted values so far, to the same reference.
  template <class T, int kKeyTiles, int kDimTiles>
  __device__ __forceinline__ void add(float (&s)[kRowTiles][kKeyTiles][4],
                                      float (&acc)[kRowTiles][kDimTiles][4],
                                      uint32_t (&weights)[kRowTiles][kKeyTiles / 2][4]) {
    float most[kRowTiles][2];
    bool outgrown = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
        most[m][h] = x;
        outgrown |= (x - top[m][h]) * scale > kSlack;
      }
    if (__any_sync(0xffffffff, outgrown)) move_references(most, acc);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float reference = scaled(top[m][h], scale);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const float a = exp2_approx(s[m][n][2 * h] * scale - reference);
          const float b = exp2_approx(s[m][n][2 * h + 1] * scale - reference);
          sum[m][h] += a + b;
          weights[m][n / 2][n % 2 * 2 + h] = pack_two<T>(a, b);
        }
      }
  }

  template <int kDimTiles>
  __device__ __forceinline__ void move_references(const float (&most)[kRowTiles][2],
                                                  float (&acc)[kRowTiles][kDimTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float higher = fmaxf(top[m][h], most[m][h]);
        const float shrink = exp2_approx(top[m][h] * scale - scaled(higher, scale));
        top[m][h] = higher;
        sum[m][h] *= shrink;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n)
          acc[m][n][2 * h] *= shrink, acc[m][n][2 * h + 1] *= shrink;
      }
  }

  // Makes `sum` the whole denominator and `top` the scaled reference.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[m][h] += __shfl_xor_sync(0xffffffff, sum[m][h], 1);
        sum[m][h] += __shfl_xor_sync(0xffffffff, sum[m][h], 2);
        top[m][h] *= scale;
      }
  }
};

// Natural logarithm of a denominator; -infinity of an empty one.
__device__ __forceinline__ float log_sum(float reference, float sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  return sum == 0 ? -kInfinity : (reference + log2f(sum)) * kLn2;
}

}  // namespace sparse_attn
