// Joins attention over two disjoint sets of keys.
#pragma once
#include "device.cuh"

namespace sparse_attn {

// blockDim.x threads per row, kVector elements each at a time; blockDim.y rows per block.
template <class T, int kVector>
__global__ void __launch_bounds__(128)
    merge_attention_states_kernel(const __grid_constant__ MergeAttentionStatesParams p) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;  // of B * H * T
  if (row >= p.B * p.H * p.T) return;
  const int64_t n = row / p.T / p.H, h = row / p.T % p.H, i = row % p.T;
  const auto at = [&](const int64_t (&stride)[3]) {
    return n * stride[0] + h * stride[1] + i * stride[2];
  };

  const float x = p.lse_a[at(p.lse_a_stride)], y = p.lse_b[at(p.lse_b_stride)];
  const float top = fmaxf(x, y);
  const bool none = top == -kInfinity;  // neither side has a key: out 0, lse -infinity
  const float weight_a = none ? 0.f : expf(x - top), weight_b = none ? 0.f : expf(y - top);
  const float sum = weight_a + weight_b;
  const float share_a = none ? 0.f : weight_a / sum, share_b = none ? 0.f : weight_b / sum;
  if (threadIdx.x == 0) p.lse[row] = none ? top : top + logf(sum);

  using Elements = Pack<T, kVector>;
  const T* const a = static_cast<const T*>(p.out_a) + at(p.out_a_stride);
  const T* const b = static_cast<const T*>(p.out_b) + at(p.out_b_stride);
  T* const out = static_cast<T*>(p.out) + row * p.Dv;
  for (int64_t d = threadIdx.x * kVector; d < p.Dv; d += blockDim.x * kVector) {
    const Elements from_a = *reinterpret_cast<const Elements*>(a + d);
    const Elements from_b = *reinterpret_cast<const Elements*>(b + d);
    Elements to;
    for (int e = 0; e < kVector; ++e) {
      // whatever the row of an empty side holds, the other is taken
      const float part_a = x == -kInfinity ? 0.f : share_a * to_float(from_a[e]);
      const float part_b = y == -kInfinity ? 0.f : share_b * to_float(from_b[e]);
      to[e] = from_float<T>(part_a + part_b);
    }
    *reinterpret_cast<Elements*>(out + d) = to;
  }
}

}  // namespace sparse_attn
