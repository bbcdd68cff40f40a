// What the bindings of hip_select and hip_prune_select share.
#pragma once
#include <tuple>

#include "../common/hip_select.h"
#include "binding.h"

namespace sparse_attn {

// Tensors as the kernels read them; they must live until the launch.
struct HipCudaInputs {
  Tensor query, key;
  KeyCache cache;
};

// Checks a call and sets what both selections have.
inline HipCudaInputs hip_cuda_inputs(
    HipParams& p, const Tensor& query, const Tensor& key, int64_t q_block, int64_t kv_block,
    int64_t sink, int64_t window, const std::string& representative, bool causal,
    std::optional<double> scale, const std::optional<Tensor>& block_table,
    const std::optional<Tensor>& kv_lengths) {
  const KeyCache cache{block_table, kv_lengths};
  check_hip_inputs(query, key, q_block, sink, window, representative, scale, cache);
  check_same_device({{"query", query}, {"key", key}});
  if (block_table.has_value())
    check_same_device({{"query", query}, {"block_table", *block_table}});
  if (kv_lengths.has_value()) check_same_device({{"query", query}, {"kv_lengths", *kv_lengths}});
  SA_CHECK(query.size(3) % 8 == 0 && query.size(3) <= 256, "query: head_dim ", query.size(3),
           ", expected a multiple of 8 up to 256");
  SA_CHECK(dtype_of(query, "query") != DType::f32, "query: expected float16 or bfloat16");
  HipCudaInputs x{aligned_rows(query), aligned_rows(key), readable(cache)};
  set_hip_params(p, x.query, x.key, q_block, kv_block, sink, window, representative, causal, scale,
                 x.cache);
  return x;
}

// Launches kernel<T, kDim>(p), a function template, as planned; `name` may ask for too much.
#define SA_LAUNCH_HIP(kernel, plan, p, query, name)                                               \
  do {                                                                                            \
    const int64_t most = limits_of(query).shared_bytes;                                           \
    SA_CHECK(plan.launch.shared_bytes <= most, name, ": needs ", plan.launch.shared_bytes,        \
             " bytes of shared memory, there are ", most);                                        \
    if (p.dtype == DType::f16)                                                                    \
      SA_LAUNCH_HIP_AS(kernel, __half, plan, p, current_stream(query));                           \
    else                                                                                          \
      SA_LAUNCH_HIP_AS(kernel, __nv_bfloat16, plan, p, current_stream(query));                    \
  } while (false)
#define SA_LAUNCH_HIP_AS(kernel, T, plan, p, stream)                                              \
  launch(plan.dim == 64 ? kernel<T, 64> : plan.dim == 128 ? kernel<T, 128> : kernel<T, 256>,      \
         plan.launch, stream, p)

}  // namespace sparse_attn
