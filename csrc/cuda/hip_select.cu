// Binds hip_select to torch.
#include "hip_select.cuh"

#include "hip_binding.h"
#include "hip_select_plan.h"

namespace sparse_attn {
namespace {

template <class T>
void run(const HipSelectCudaParams& p, const HipPlan& plan, cudaStream_t stream) {
  SA_LAUNCH_HIP(hip_select_kernel, T, plan, p, stream)
}

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
  check_hip_plan(plan, limits_of(x.query), "budget");
  switch (p.dtype) {
    case DType::f16: run<__half>(p, plan, current_stream(x.query)); break;
    case DType::bf16: run<__nv_bfloat16>(p, plan, current_stream(x.query)); break;
    case DType::f32: SA_CHECK(false, "query: expected float16 or bfloat16");
  }
  return {indices, counts};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("hip_select.cuda", TORCH_BOX(&hip_select)); }

}  // namespace sparse_attn
