// Binds hip_prune_select to torch.
#include "hip_prune_select.cuh"

#include "hip_binding.h"
#include "hip_prune_select_plan.h"

namespace sparse_attn {
namespace {

std::tuple<Tensor, Tensor> hip_prune_select(
    Tensor query, Tensor key, std::vector<int64_t> chunks, std::vector<int64_t> keeps,
    std::vector<int64_t> q_strides, int64_t q_block, int64_t sink, int64_t window,
    std::string representative, std::string merge_heads, bool causal, std::optional<double> scale,
    std::optional<Tensor> block_table, std::optional<Tensor> kv_lengths) {
  HipPruneCudaParams p{};
  SA_CHECK(!chunks.empty(), "chunks: expected one size per stage");
  const HipCudaInputs x =
      hip_cuda_inputs(p, query, key, q_block, chunks.back(), sink, window, representative, causal,
                      scale, block_table, kv_lengths);
  const DeviceGuard guard(query.get_device_index());
  set_hip_stages(p, chunks, keeps, q_strides, merge_heads);
  auto [indices, counts] = empty_hip_index(p, x.query);
  const HipPlan plan = plan_hip_prune_select(p, limits_of(x.query));
  SA_LAUNCH_HIP(hip_prune_select_kernel, plan, p, x.query, "keeps");
  return {indices, counts};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("hip_prune_select.cuda", TORCH_BOX(&hip_prune_select)); }

}  // namespace sparse_attn
