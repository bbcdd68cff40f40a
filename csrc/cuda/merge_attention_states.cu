// Binds merge_attention_states to torch.
#include <tuple>

#include "../common/merge_attention_states.h"
#include "binding.h"
#include "merge_attention_states.cuh"
#include "merge_attention_states_plan.h"

namespace sparse_attn {
namespace {

template <class T>
void run(const MergeAttentionStatesParams& p, cudaStream_t stream) {
  const MergeAttentionStatesPlan plan = plan_merge_attention_states(p);
  if (plan.vector == 8)
    launch(merge_attention_states_kernel<T, 8>, plan.launch, stream, p);
  else
    launch(merge_attention_states_kernel<T, 1>, plan.launch, stream, p);
}

std::tuple<Tensor, Tensor> merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b,
                                                  Tensor lse_b) {
  check_merge_attention_states(out_a, lse_a, out_b, lse_b);
  SA_CHECK(out_a.numel() > 0, "out_a: expected [B, H, T, Dv], not empty");
  check_same_device({{"out_a", out_a}, {"lse_a", lse_a}, {"out_b", out_b}, {"lse_b", lse_b}});
  const DeviceGuard guard(out_a.get_device_index());
  out_a = last_dim_contiguous(out_a), out_b = last_dim_contiguous(out_b);
  const int64_t B = out_a.size(0), H = out_a.size(1), T = out_a.size(2), Dv = out_a.size(3);
  Tensor out = torch::stable::new_empty(out_a, {B, H, T, Dv});
  Tensor lse = torch::stable::new_empty(out_a, {B, H, T}, ScalarType::Float);
  const auto p = merge_attention_states_params(out_a, lse_a, out_b, lse_b, out, lse);
  switch (p.dtype) {
    case DType::f16: run<__half>(p, current_stream(out_a)); break;
    case DType::bf16: run<__nv_bfloat16>(p, current_stream(out_a)); break;
    case DType::f32: SA_CHECK(false, "out_a: expected float16 or bfloat16");
  }
  return {out, lse};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) {
  m.impl("merge_attention_states.cuda", TORCH_BOX(&merge_attention_states));
}

}  // namespace sparse_attn
