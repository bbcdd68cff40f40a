// hip_prune_select, and what its plan says.
#include "cuda/hip_prune_select.cuh"
#include "cuda/hip_prune_select_plan.h"
#include "simt/ops/hip_common.h"

namespace sparse_attn {
namespace {

HipPruneCudaParams params(const simt::Arguments& a) {
  const int64_t heads = a.tensor("query").sizes[1], group = heads / a.tensor("key").sizes[1];
  auto p = hip_params<HipPruneCudaParams>(a, a.number("merge_heads=all", 0) != 0     ? heads
                                             : a.number("merge_heads=group", 0) != 0 ? group
                                                                                     : 1);
  const auto of = [&](const char* name, int64_t i) {
    const std::string full = name + ("[" + std::to_string(i) + "]");
    return static_cast<int64_t>(a.number(full, 0));
  };
  for (; p.stages < kHipMostStages && of("chunks", p.stages) != 0; ++p.stages) {
    const int64_t i = p.stages;
    p.chunks[i] = of("chunks", i), p.q_strides[i] = of("q_strides", i);
    p.keeps[i] = ceil_div(std::min(of("keeps", i), p.Tk + p.chunks[i]), p.chunks[i]);
  }
  return p;
}

template <class T>
void run_as(const simt::Arguments& a) {
  HipPruneCudaParams p = params(a);
  const HipPrunePlan plan = plan_hip_prune_select(p, limits(a));
  switch (plan.dim) {
    case 64: launch<hip_prune_select_kernel<T, 64>>(a, plan.launch, p); break;
    case 128: launch<hip_prune_select_kernel<T, 128>>(a, plan.launch, p); break;
    case 256: launch<hip_prune_select_kernel<T, 256>>(a, plan.launch, p); break;
  }
}

void run(const simt::Arguments& a) {
  if (dtype(a) == DType::f16)
    run_as<__half>(a);
  else
    run_as<__nv_bfloat16>(a);
}

void show_plan(const simt::Arguments& a) {
  HipPruneCudaParams p = params(a);
  const HipPrunePlan plan = plan_hip_prune_select(p, limits(a));
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("hip_prune_select", run);
const simt::Register register_plan("hip_prune_select_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
