// hip_select, and what its plan says.
#include "cuda/hip_select.cuh"
#include "cuda/hip_select_plan.h"
#include "simt/ops/hip_common.h"

namespace sparse_attn {
namespace {

HipSelectCudaParams params(const simt::Arguments& a) {
  HipSelectCudaParams p{};
  set_hip_params(a, p);
  p.kv_block = static_cast<int64_t>(a.number("kv_block"));
  p.q_stride = static_cast<int64_t>(a.number("q_stride"));
  p.key_step = static_cast<int64_t>(a.number("key_stride"));
  p.branch = static_cast<int64_t>(a.number("branch"));
  p.keep = p.K;
  return p;
}

void run(const simt::Arguments& a) {
  HipSelectCudaParams p = params(a);
  const HipPlan plan = plan_hip_select(p, limits(a));
  SIMT_LAUNCH_HIP(hip_select_kernel, a, plan, p)
}

void show_plan(const simt::Arguments& a) {
  HipSelectCudaParams p = params(a);
  const HipPlan plan = plan_hip_select(p, limits(a));
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("hip_select", run);
const simt::Register register_plan("hip_select_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
