// Binds sale_threshold to torch.
#include "sale_threshold.cuh"

#include <algorithm>

#include "binding.h"
#include "sale_threshold_plan.h"

namespace sparse_attn {
namespace {

// A call through torch.ops has not been checked by anybody.
void check_sale_threshold(const Tensor& query, const Tensor& key, const Tensor& key_mean,
                          const Tensor& threshold, int64_t q_block, int64_t kv_block, int64_t local,
                          int64_t sink, bool causal, std::optional<double> scale) {
  SA_CHECK(query.dim() == 4 && query.numel() > 0, "query: expected [B, Hq, Tq, D], not empty");
  SA_CHECK(key.dim() == 4 && key.numel() > 0, "key: expected [B, Hkv, Tk, D], not empty");
  SA_CHECK(key.scalar_type() == query.scalar_type(), "key: dtype differs from query's");
  SA_CHECK(key.size(0) == query.size(0) && key.size(3) == query.size(3),
           "key: batch size or head_dim differs from query's");
  SA_CHECK(query.size(1) % key.size(1) == 0, "query: heads are no multiple of key's");
  check_lengths(query.size(2), key.size(2));
  SA_CHECK(key_mean.dim() == 3 && key_mean.scalar_type() == ScalarType::Float &&
               key_mean.size(0) == key.size(0) && key_mean.size(1) == key.size(1) &&
               key_mean.size(2) == key.size(3),
           "key_mean: expected float32 [B, Hkv, D] as key");
  SA_CHECK(threshold.dim() == 1 && threshold.scalar_type() == ScalarType::Float &&
               threshold.size(0) == query.size(1),
           "threshold: expected float32 [Hq] as query");
  SA_CHECK(q_block == 16 || q_block == 32 || q_block == 64 || q_block == 128, "q_block: got ",
           q_block, ", expected 16, 32, 64 or 128");
  SA_CHECK(kv_block == 16 || kv_block == 32 || kv_block == 64, "kv_block: got ", kv_block,
           ", expected 16, 32 or 64");
  SA_CHECK(local >= 1, "local: got ", local, ", expected 1 or more");
  SA_CHECK(sink >= 0, "sink: got ", sink, ", expected 0 or more");
  SA_CHECK(causal, "causal: SALE is defined for causal prefill");
  check_scale(scale);
  SA_CHECK(scale.value_or(0) >= 0, "scale: expected 0 or more; negate the query instead");
  SA_CHECK(query.size(3) % 8 == 0 && query.size(3) <= 256, "query: head_dim ", query.size(3),
           ", expected a multiple of 8 up to 256");
}

Tensor sale_threshold(Tensor query, Tensor key, Tensor key_mean, Tensor threshold, int64_t q_block,
                      int64_t kv_block, int64_t local, int64_t sink, bool causal,
                      std::optional<double> scale) {
  check_sale_threshold(query, key, key_mean, threshold, q_block, kv_block, local, sink, causal,
                       scale);
  check_same_device(
      {{"query", query}, {"key", key}, {"key_mean", key_mean}, {"threshold", threshold}});
  const DeviceGuard guard(query.get_device_index());
  query = aligned_rows(query), key = aligned_rows(key);
  key_mean = torch::stable::contiguous(key_mean), threshold = torch::stable::contiguous(threshold);
  SaleThresholdCudaParams p{};
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr();
  p.key_mean = key_mean.const_data_ptr<float>();
  p.threshold = threshold.const_data_ptr<float>();
  for (int i = 0; i < 3; ++i) p.query_stride[i] = query.stride(i), p.key_stride[i] = key.stride(i);
  p.B = query.size(0), p.Hq = query.size(1), p.Tq = query.size(2), p.D = query.size(3);
  p.Hkv = key.size(1), p.Tk = key.size(2), p.Mq = ceil_div(p.Tq, q_block);
  p.q_block = q_block, p.kv_block = kv_block;
  // longer than all keys is as long as them: nothing overflows
  p.local_blocks = ceil_div(std::min(local, p.Tk + 128), kv_block);
  p.sink_blocks = ceil_div(std::min(sink, p.Tk), kv_block);
  p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D))));
  p.dtype = dtype_of(query, "query");
  Tensor theta = torch::stable::new_empty(query, {p.B, p.Hq, p.Tq}, ScalarType::Float);
  p.theta = theta.mutable_data_ptr<float>();
  const SaleThresholdPlan plan = plan_sale_threshold(p);
  const cudaStream_t stream = current_stream(query);
  with_threshold_dim(plan, [&]<int kDim>() {
    switch (p.dtype) {
      case DType::f16: launch(sale_threshold_kernel<__half, kDim>, plan.launch, stream, p); break;
      case DType::bf16:
        launch(sale_threshold_kernel<__nv_bfloat16, kDim>, plan.launch, stream, p);
        break;
      case DType::f32: SA_CHECK(false, "query: expected float16 or bfloat16");
    }
  });
  return theta;
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("sale_threshold.cuda", TORCH_BOX(&sale_threshold)); }

}  // namespace sparse_attn
