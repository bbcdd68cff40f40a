// Binds hip_select to torch.
#include "hip_select.cuh"

#include "hip_binding.h"
#include "hip_select_plan.h"

namespace sparse_attn {
namespace {

std::tuple<Tensor, Tensor> hip_select(Tensor query, Tensor key, int64_t budget, int64_t q_block,
                                      int64_t kv_block, int64_t q_stride, int64_t key_stride,
                                      int64_t sink, int64_t window, std::string representative,
                                      int64_t branch, bool share_kv_heads, bool causal,
                                      std::optional<double> scale,
                                      std::optional<Tensor> block_table,
                                      std::optional<Tensor> kv_lengths) {
  HipSelectCudaParams p{};
  const HipCudaInputs x =
      hip_cuda_inputs(p, query, key, q_block, kv_block, sink, window, representative, causal, scale,
                      block_table, kv_lengths);
  const DeviceGuard guard(query.get_device_index());
  set_hip_search(p, budget, q_stride, key_stride, branch, share_kv_heads);
  auto [indices, counts] = empty_hip_index(p, x.query);
  const HipPlan plan = plan_hip_select(p, limits_of(x.query));
  SA_LAUNCH_HIP(hip_select_kernel, plan, p, x.query, "budget");
  return {indices, counts};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("hip_select.cuda", TORCH_BOX(&hip_select)); }

}  // namespace sparse_attn
