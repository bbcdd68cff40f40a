// hip_select, and what its plan says.
#include "cuda/hip_select.cuh"
#include "cuda/hip_select_plan.h"
#include "simt/ops/hip_common.h"

namespace sparse_attn {
namespace {

HipSelectCudaParams params(const simt::Arguments& a) {
  const int64_t group = a.tensor("query").sizes[1] / a.tensor("key").sizes[1];
  const bool shared = a.number("share_kv_heads") != 0;
  auto p = hip_params<HipSelectCudaParams>(a, shared ? group : 1);
  p.kv_block = static_cast<int64_t>(a.number("kv_block"));
  p.q_stride = static_cast<int64_t>(a.number("q_stride"));
  p.key_stride_in_block = static_cast<int64_t>(a.number("key_stride"));
  p.keep = ceil_div(std::min(static_cast<int64_t>(a.number("budget")), p.Tk), p.kv_block);
  p.log2_branch = a.number("branch") == 4 ? 2 : 1;
  return p;
}

template <class T>
void run_as(const simt::Arguments& a) {
  HipSelectCudaParams p = params(a);
  const HipSelectPlan plan = plan_hip_select(p, limits(a));
  switch (plan.dim) {
    case 64: launch<hip_select_kernel<T, 64>>(a, plan.launch, p); break;
    case 128: launch<hip_select_kernel<T, 128>>(a, plan.launch, p); break;
    case 256: launch<hip_select_kernel<T, 256>>(a, plan.launch, p); break;
  }
}

void run(const simt::Arguments& a) {
  if (dtype(a) == DType::f16)
    run_as<__half>(a);
  else
    run_as<__nv_bfloat16>(a);
}

void show_plan(const simt::Arguments& a) {
  HipSelectCudaParams p = params(a);
  const HipSelectPlan plan = plan_hip_select(p, limits(a));
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("hip_select", run);
const simt::Register register_plan("hip_select_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
