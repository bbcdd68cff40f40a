// The checks of flex_prefill_select and its parameters, for the bindings of every device.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "stable.h"

namespace sparse_attn {

// A call through torch.ops has not been checked by anybody.
inline void check_flex_prefill_select(const Tensor& query, const Tensor& key, double gamma,
                                      double tau, int64_t min_budget,
                                      std::optional<int64_t> max_budget, int64_t block,
                                      const std::string& variant, bool causal,
                                      std::optional<double> scale) {
  SA_CHECK(query.dim() == 4 && query.numel() > 0, "query: expected [B, Hq, Tq, D], not empty");
  SA_CHECK(key.dim() == 4 && key.numel() > 0, "key: expected [B, Hkv, Tk, D], not empty");
  dtype_of(query, "query");
  SA_CHECK(key.scalar_type() == query.scalar_type(), "key: dtype differs from query's");
  SA_CHECK(key.size(0) == query.size(0) && key.size(3) == query.size(3),
           "key: batch size or head_dim differs from query's");
  SA_CHECK(query.size(1) % key.size(1) == 0, "query: heads are no multiple of key's");
  check_lengths(query.size(2), key.size(2));
  SA_CHECK(block >= 1 && block <= 128, "block_size: got ", block, ", expected 1 to 128");
  SA_CHECK(gamma > 0, "gamma: got ", gamma, ", expected more than 0");
  SA_CHECK(tau >= 0, "tau: got ", tau, ", expected 0 or more");
  SA_CHECK(min_budget >= 0, "min_budget: got ", min_budget, ", expected 0 or more");
  SA_CHECK(max_budget.value_or(1) >= 1, "max_budget: got ", *max_budget, ", expected 1 or more");
  check_scale(scale);
  SA_CHECK(variant == "exact", "variant: got ", variant, ", this kernel serves exact");
  SA_CHECK(causal, "causal: FlexPrefill is defined for causal prefill");
}

inline FlexPrefillParams flex_prefill_params(const Tensor& query, const Tensor& key, int64_t block,
                                             std::optional<double> scale) {
  FlexPrefillParams p{};
  p.dtype = dtype_of(query, "query");
  p.B = query.size(0), p.Hq = query.size(1), p.Tq = query.size(2), p.D = query.size(3);
  p.Hkv = key.size(1), p.Tk = key.size(2);
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.query_stride[i] = query.stride(i), p.key_stride[i] = key.stride(i);
  p.block = block;
  p.probe = std::min({block, p.Tq, p.Tk});
  p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D))));
  return p;
}

}  // namespace sparse_attn
