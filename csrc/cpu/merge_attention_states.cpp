// Joins attention over two disjoint sets of keys.
#include <cmath>
#include <limits>
#include <tuple>

#include "../common/stable.h"

namespace sparse_attn {
namespace {

template <class T>
void merge_rows(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
                Tensor& out, Tensor& lse) {
  const int64_t H = out.size(1), T_ = out.size(2), Dv = out.size(3);
  const T *a = static_cast<const T*>(out_a.const_data_ptr()),
          *b = static_cast<const T*>(out_b.const_data_ptr());
  const float *la = lse_a.const_data_ptr<float>(), *lb = lse_b.const_data_ptr<float>();
  T* to = static_cast<T*>(out.mutable_data_ptr());
  float* l = lse.mutable_data_ptr<float>();
  const auto at = [](const Tensor& t, int64_t n, int64_t h, int64_t i) {
    return n * t.stride(0) + h * t.stride(1) + i * t.stride(2);
  };
  torch::stable::parallel_for(0, out.size(0) * H * T_, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / T_ / H, h = r / T_ % H, i = r % T_;
      const float x = la[at(lse_a, n, h, i)], y = lb[at(lse_b, n, h, i)];
      const float top = std::max(x, y);
      const bool none = top == -std::numeric_limits<float>::infinity();
      const float wx = none ? 0 : std::exp(x - top), wy = none ? 0 : std::exp(y - top);
      const float sum = wx + wy, fx = none ? 0 : wx / sum, fy = none ? 0 : wy / sum;
      l[r] = none ? top : top + std::log(sum);
      const T *ra = a + at(out_a, n, h, i), *rb = b + at(out_b, n, h, i);
      for (int64_t d = 0; d < Dv; ++d)
        to[r * Dv + d] = static_cast<T>(fx * static_cast<float>(ra[d]) +
                                        fy * static_cast<float>(rb[d]));
    }
  });
}

std::tuple<Tensor, Tensor> merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b,
                                                  Tensor lse_b) {
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
  out_a = last_dim_contiguous(out_a), out_b = last_dim_contiguous(out_b);
  const int64_t B = out_a.size(0), H = out_a.size(1), T = out_a.size(2), Dv = out_a.size(3);
  Tensor out = torch::stable::new_empty(out_a, {B, H, T, Dv});
  Tensor lse = torch::stable::new_empty(out_a, {B, H, T}, ScalarType::Float);
  switch (dtype_of(out_a, "out_a")) {
    case DType::f32: merge_rows<float>(out_a, lse_a, out_b, lse_b, out, lse); break;
    case DType::f16: merge_rows<c10::Half>(out_a, lse_a, out_b, lse_b, out, lse); break;
    case DType::bf16: merge_rows<c10::BFloat16>(out_a, lse_a, out_b, lse_b, out, lse); break;
  }
  return {out, lse};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) {
  m.impl("merge_attention_states.cpp", TORCH_BOX(&merge_attention_states));
}

}  // namespace sparse_attn
