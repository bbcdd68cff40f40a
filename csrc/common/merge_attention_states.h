// The checks of merge_attention_states and its parameters, for the bindings of every device.
#pragma once
#include "stable.h"

namespace sparse_attn {

// A call through torch.ops has not been checked by anybody.
inline void check_merge_attention_states(const Tensor& out_a, const Tensor& lse_a,
                                         const Tensor& out_b, const Tensor& lse_b) {
  SA_CHECK(out_a.dim() == 4 && out_b.dim() == 4, "out_a, out_b: expected [B, H, T, Dv]");
  SA_CHECK(out_b.scalar_type() == out_a.scalar_type(), "out_b: dtype differs from out_a's");
  for (const Tensor* lse : {&lse_a, &lse_b}) {
    SA_CHECK(lse->dim() == 3 && lse->scalar_type() == ScalarType::Float,
             "lse_a, lse_b: expected float32 [B, H, T]");
    for (int i = 0; i < 3; ++i)
      SA_CHECK(lse->size(i) == out_a.size(i), "lse_a, lse_b: shape differs from out_a's");
  }
  for (int i = 0; i < 4; ++i)
    SA_CHECK(out_b.size(i) == out_a.size(i), "out_b: shape differs from out_a's");
}

inline MergeAttentionStatesParams merge_attention_states_params(
    const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
    Tensor& out, Tensor& lse) {
  MergeAttentionStatesParams p{};
  p.out_a = out_a.const_data_ptr(), p.out_b = out_b.const_data_ptr();
  p.lse_a = lse_a.const_data_ptr<float>(), p.lse_b = lse_b.const_data_ptr<float>();
  p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr<float>();
  for (int i = 0; i < 3; ++i) {
    p.out_a_stride[i] = out_a.stride(i), p.out_b_stride[i] = out_b.stride(i);
    p.lse_a_stride[i] = lse_a.stride(i), p.lse_b_stride[i] = lse_b.stride(i);
  }
  p.B = out.size(0), p.H = out.size(1), p.T = out.size(2), p.Dv = out.size(3);
  p.dtype = dtype_of(out_a, "out_a");
  return p;
}

}  // namespace sparse_attn
