// The checks of sale_quantize and its parameters, for the bindings of every device.
#pragma once
#include <optional>
#include <string>

#include "stable.h"

namespace sparse_attn {

inline SaleGroup sale_group(const std::string& name) {
  SA_CHECK(name == "query" || name == "key", "group: got ", name, ", expected query or key");
  return name == "query" ? SaleGroup::query : SaleGroup::key;
}

// A call through torch.ops has not been checked by anybody.
inline void check_sale_quantize(const Tensor& x, const std::optional<Tensor>& mean,
                                int64_t block) {
  SA_CHECK(x.dim() == 4 && x.numel() > 0, "x: expected [B, H, T, D], not empty");
  SA_CHECK(x.size(3) % 2 == 0, "x: head_dim ", x.size(3), ", expected an even one");
  dtype_of(x, "x");
  SA_CHECK(block == 16 || block == 32 || block == 64, "block: got ", block,
           ", expected 16, 32 or 64");
  if (!mean) return;
  SA_CHECK(mean->dim() == 3 && mean->scalar_type() == ScalarType::Float &&
               mean->size(0) == x.size(0) && mean->size(1) == x.size(1) &&
               mean->size(2) == x.size(3),
           "mean: expected float32 [B, H, D] as x");
}

// All but the results.
inline SaleQuantizeParams sale_quantize_params(const Tensor& x, bool mean_given, SaleGroup group,
                                               int64_t block) {
  SaleQuantizeParams p{};
  p.x = x.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.x_stride[i] = x.stride(i);
  p.B = x.size(0), p.H = x.size(1), p.T = x.size(2), p.D = x.size(3);
  p.block = block, p.group = group, p.mean_given = mean_given;
  p.groups = group == SaleGroup::query ? 8 * ((p.T + 15) / 16) : 4 * ((p.T + block - 1) / block);
  p.dtype = dtype_of(x, "x");
  return p;
}

}  // namespace sparse_attn
