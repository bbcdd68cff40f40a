// Binds flex_prefill_select to torch.
#include "flex_prefill_select.cuh"

#include <tuple>

#include "../common/flex_prefill_select.h"
#include "binding.h"
#include "flex_prefill_select_plan.h"

namespace sparse_attn {
namespace {

template <class T>
void run(const FlexPrefillCudaParams& p, const FlexPrefillPlan& plan, cudaStream_t stream) {
  if (plan.chooses) {
    launch(block_mean_kernel<T, false>, plan.mean_key, stream, p);
    launch(probe_extent_kernel<T>, plan.extent, stream, p);
    launch(probe_profile_kernel<T, false>, plan.profile, stream, p);
    launch(probe_profile_kernel<T, true>, plan.attribute, stream, p);
    launch(block_sum_kernel<T>, plan.block_sum, stream, p);
    launch(choose_kernel, plan.choose, stream, p);
  }
  if (plan.per_row) {
    launch(block_mean_kernel<T, true>, plan.mean_query, stream, p);
    launch(block_score_kernel, plan.block_score, stream, p);
  }
  launch(list_kernel, plan.list, stream, p);
}

std::tuple<Tensor, Tensor, Tensor> flex_prefill_select(
    Tensor query, Tensor key, double gamma, double tau, int64_t min_budget,
    std::optional<int64_t> max_budget, int64_t block_size, std::string variant, bool causal,
    std::optional<double> scale) {
  check_flex_prefill_select(query, key, gamma, tau, min_budget, max_budget, block_size, variant,
                            causal, scale);
  check_same_device({{"query", query}, {"key", key}});
  SA_CHECK(query.size(3) % 8 == 0 && query.size(3) <= 256, "query: head_dim ", query.size(3),
           ", expected a multiple of 8 up to 256");
  const DeviceGuard guard(query.get_device_index());
  query = aligned_rows(query), key = aligned_rows(key);
  FlexPrefillCudaParams p{flex_prefill_params(query, key, block_size, scale)};
  p.gamma = static_cast<float>(gamma), p.tau = static_cast<float>(tau);
  size_flex_prefill(p, min_budget, max_budget.value_or(-1));
  const FlexPrefillPlan plan = plan_flex_prefill_select(p);
  Tensor indices = torch::stable::new_empty(query, {p.B, p.Hq, p.Mq, p.Nk}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(query, {p.B, p.Hq, p.Mq}, ScalarType::Int);
  Tensor pattern = torch::stable::new_empty(query, {p.B, p.Hq}, ScalarType::Int);
  p.indices = indices.mutable_data_ptr<int32_t>(), p.counts = counts.mutable_data_ptr<int32_t>();
  p.pattern = pattern.mutable_data_ptr<int32_t>();
  const int64_t bytes = place_flex_prefill_buffers(p, plan, nullptr);
  Tensor scratch = torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
  place_flex_prefill_buffers(p, plan, static_cast<char*>(scratch.mutable_data_ptr()));
  switch (p.dtype) {
    case DType::f16: run<__half>(p, plan, current_stream(query)); break;
    case DType::bf16: run<__nv_bfloat16>(p, plan, current_stream(query)); break;
    case DType::f32: SA_CHECK(false, "query: expected float16 or bfloat16");
  }
  return {indices, counts, pattern};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("flex_prefill_select.cuda", TORCH_BOX(&flex_prefill_select)); }

}  // namespace sparse_attn
