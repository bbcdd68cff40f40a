// Joins attention over two disjoint sets of keys.
#include <cmath>
#include <limits>
#include <tuple>

#include "../common/merge_attention_states.h"

namespace sparse_attn {
namespace {

template <class T>
void merge_rows(const MergeAttentionStatesParams& p) {
  const T *a = static_cast<const T*>(p.out_a), *b = static_cast<const T*>(p.out_b);
  T* to = static_cast<T*>(p.out);
  torch::stable::parallel_for(0, p.B * p.H * p.T, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / p.T / p.H, h = r / p.T % p.H, i = r % p.T;
      const auto at = [&](const int64_t (&stride)[3]) {
        return n * stride[0] + h * stride[1] + i * stride[2];
      };
      const float x = p.lse_a[at(p.lse_a_stride)], y = p.lse_b[at(p.lse_b_stride)];
      const float top = std::max(x, y);
      constexpr float kEmpty = -std::numeric_limits<float>::infinity();
      const bool none = top == kEmpty;
      const float wx = none ? 0 : std::exp(x - top), wy = none ? 0 : std::exp(y - top);
      const float sum = wx + wy, fx = none ? 0 : wx / sum, fy = none ? 0 : wy / sum;
      p.lse[r] = none ? top : top + std::log(sum);
      const T *ra = a + at(p.out_a_stride), *rb = b + at(p.out_b_stride);
      // an empty side is not read: whatever its row holds, the other is taken
      for (int64_t d = 0; d < p.Dv; ++d)
        to[r * p.Dv + d] = static_cast<T>((x == kEmpty ? 0 : fx * static_cast<float>(ra[d])) +
                                          (y == kEmpty ? 0 : fy * static_cast<float>(rb[d])));
    }
  });
}

std::tuple<Tensor, Tensor> merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b,
                                                  Tensor lse_b) {
  check_merge_attention_states(out_a, lse_a, out_b, lse_b);
  out_a = last_dim_contiguous(out_a), out_b = last_dim_contiguous(out_b);
  const int64_t B = out_a.size(0), H = out_a.size(1), T = out_a.size(2), Dv = out_a.size(3);
  Tensor out = torch::stable::new_empty(out_a, {B, H, T, Dv});
  Tensor lse = torch::stable::new_empty(out_a, {B, H, T}, ScalarType::Float);
  const auto p = merge_attention_states_params(out_a, lse_a, out_b, lse_b, out, lse);
  switch (p.dtype) {
    case DType::f32: merge_rows<float>(p); break;
    case DType::f16: merge_rows<c10::Half>(p); break;
    case DType::bf16: merge_rows<c10::BFloat16>(p); break;
  }
  return {out, lse};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) {
  m.impl("merge_attention_states.cpp", TORCH_BOX(&merge_attention_states));
}

}  // namespace sparse_attn
