// sale_threshold, and what its plan says.
#include "cuda/sale_threshold.cuh"
#include "cuda/sale_threshold_plan.h"
#include "simt/ops/common.h"

namespace sparse_attn {
namespace {

SaleThresholdCudaParams params(const simt::Arguments& a) {
  SaleThresholdCudaParams p{};
  p.query = a.pointer<void>("query"), p.key = a.pointer<void>("key");
  p.key_mean = a.pointer<float>("key_mean"), p.threshold = a.pointer<float>("threshold");
  p.theta = a.pointer<float>("theta");
  strides(a.tensor("query"), p.query_stride), strides(a.tensor("key"), p.key_stride);
  const auto &query = a.tensor("query").sizes, &key = a.tensor("key").sizes;
  p.B = query[0], p.Hq = query[1], p.Tq = query[2], p.D = query[3];
  p.Hkv = key[1], p.Tk = key[2];
  const auto number = [&](const char* name) { return static_cast<int64_t>(a.number(name)); };
  p.q_block = number("q_block"), p.kv_block = number("kv_block");
  p.Mq = ceil_div(p.Tq, p.q_block);
  p.local_blocks = ceil_div(std::min(number("local"), p.Tk + 128), p.kv_block);
  p.sink_blocks = ceil_div(std::min(number("sink"), p.Tk), p.kv_block);
  p.scale = static_cast<float>(a.number("scale", 1 / std::sqrt(static_cast<double>(p.D))));
  p.dtype = dtype(a);
  return p;
}

void run(const simt::Arguments& a) {
  SaleThresholdCudaParams p = params(a);
  const SaleThresholdPlan plan = plan_sale_threshold(p);
  with_threshold_dim(plan, [&]<int kDim>() {
    if (p.dtype == DType::f16)
      launch<sale_threshold_kernel<__half, kDim>>(a, plan.launch, p);
    else
      launch<sale_threshold_kernel<__nv_bfloat16, kDim>>(a, plan.launch, p);
  });
}

void show_plan(const simt::Arguments& a) {
  SaleThresholdCudaParams p = params(a);
  const SaleThresholdPlan plan = plan_sale_threshold(p);
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("sale_threshold", run);
const simt::Register register_plan("sale_threshold_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
