// hip_prune_select, and what its plan says.
#include "cuda/hip_prune_select.cuh"
#include "cuda/hip_prune_select_plan.h"
#include "simt/ops/hip_common.h"

namespace sparse_attn {
namespace {

HipPruneCudaParams params(const simt::Arguments& a) {
  HipPruneCudaParams p{};
  set_hip_params(a, p);
  const auto of = [&](const std::string& name) {
    return static_cast<int64_t>(a.number(name + "[" + std::to_string(p.stages) + "]", 0));
  };
  for (; p.stages < kHipStages && of("chunks") != 0; ++p.stages) {
    const int64_t i = p.stages;
    p.chunk[i] = p.kv_block = of("chunks"), p.q_stride[i] = of("q_strides");
    p.keep[i] = ceil_div(of("keeps"), p.chunk[i]);
  }
  return p;
}

void run(const simt::Arguments& a) {
  HipPruneCudaParams p = params(a);
  const HipPlan plan = plan_hip_prune_select(p, limits(a));
  SIMT_LAUNCH_HIP(hip_prune_select_kernel, a, plan, p)
}

void show_plan(const simt::Arguments& a) {
  HipPruneCudaParams p = params(a);
  const HipPlan plan = plan_hip_prune_select(p, limits(a));
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("hip_prune_select", run);
const simt::Register register_plan("hip_prune_select_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
