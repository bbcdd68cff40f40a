// merge_attention_states, and what its plan says.
#include "cuda/merge_attention_states.cuh"
#include "cuda/merge_attention_states_plan.h"
#include "simt/ops/common.h"

namespace sparse_attn {
namespace {

MergeAttentionStatesParams params(const simt::Arguments& a) {
  MergeAttentionStatesParams p{};
  p.out_a = a.pointer<void>("out_a"), p.out_b = a.pointer<void>("out_b");
  p.lse_a = a.pointer<float>("lse_a"), p.lse_b = a.pointer<float>("lse_b");
  p.out = a.pointer<void>("out"), p.lse = a.pointer<float>("lse");
  strides(a.tensor("out_a"), p.out_a_stride), strides(a.tensor("out_b"), p.out_b_stride);
  strides(a.tensor("lse_a"), p.lse_a_stride), strides(a.tensor("lse_b"), p.lse_b_stride);
  const auto& sizes = a.tensor("out").sizes;
  p.B = sizes[0], p.H = sizes[1], p.T = sizes[2], p.Dv = sizes[3];
  p.dtype = dtype(a);
  return p;
}

template <class T>
void run_as(const simt::Arguments& a) {
  const MergeAttentionStatesParams p = params(a);
  const MergeAttentionStatesPlan plan = plan_merge_attention_states(p);
  if (plan.vector == 8)
    launch<merge_attention_states_kernel<T, 8>>(a, plan.launch, p);
  else
    launch<merge_attention_states_kernel<T, 1>>(a, plan.launch, p);
}

void run(const simt::Arguments& a) {
  switch (dtype(a)) {
    case DType::f16: run_as<__half>(a); break;
    case DType::bf16: run_as<__nv_bfloat16>(a); break;
    case DType::f32: throw std::runtime_error("no float32");
  }
}

void show_plan(const simt::Arguments& a) {
  const MergeAttentionStatesParams p = params(a);
  a.give("params", p), a.give("plan", plan_merge_attention_states(p));
}

const simt::Register register_run("merge_attention_states", run);
const simt::Register register_plan("merge_attention_states_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
