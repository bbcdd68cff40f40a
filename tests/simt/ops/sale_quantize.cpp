// sale_quantize, and what its plan says.
#include "cuda/sale_quantize.cuh"
#include "cuda/sale_quantize_plan.h"
#include "simt/ops/common.h"

namespace sparse_attn {
namespace {

SaleQuantizeCudaParams params(const simt::Arguments& a) {
  SaleQuantizeCudaParams p{};
  p.x = a.pointer<void>("x"), p.packed = a.pointer<uint8_t>("packed");
  p.step = a.pointer<float>("step"), p.center = a.pointer<float>("center");
  strides(a.tensor("x"), p.x_stride);
  const auto& sizes = a.tensor("x").sizes;
  p.B = sizes[0], p.H = sizes[1], p.T = sizes[2], p.D = sizes[3];
  p.groups = a.tensor("step").sizes[2];
  p.block = static_cast<int64_t>(a.number("block"));
  p.group = static_cast<SaleGroup>(a.number("group"));
  p.mean_given = a.tensors.count("mean") > 0;
  p.dtype = dtype(a);
  size_sale_quantize(p);
  return p;
}

template <class T>
void run_as(const simt::Arguments& given) {
  simt::Arguments a = given;
  SaleQuantizeCudaParams p = params(a);
  if (p.mean_given)
    std::memcpy(p.center, a.pointer<float>("mean"), static_cast<size_t>(p.B * p.H * p.D) * 4);
  const simt::Workspace scratch(
      a, "scratch", static_cast<size_t>(place_sale_quantize_buffers(p, nullptr)));
  place_sale_quantize_buffers(p, a.pointer<char>("scratch"));
  const SaleQuantizePlan plan = plan_sale_quantize(p);
  if (!p.mean_given) launch<sale_sum_kernel<T>>(a, plan.sum, p);
  launch<sale_mean_kernel>(a, plan.mean, p);
  launch<sale_code_kernel<T>>(a, plan.code, p);
}

void run(const simt::Arguments& a) {
  if (dtype(a) == DType::f16)
    run_as<__half>(a);
  else
    run_as<__nv_bfloat16>(a);
}

void show_plan(const simt::Arguments& a) {
  SaleQuantizeCudaParams p = params(a);
  place_sale_quantize_buffers(p, a.pointer<char>("scratch"));
  a.give("params", p), a.give("plan", plan_sale_quantize(p));
}

const simt::Register register_run("sale_quantize", run);
const simt::Register register_plan("sale_quantize_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
