// sale_estimate, and what its plan says. An odd seed runs the products of 4-bit integers, which
// GPUs up to sm_89 have, an even one those of 8-bit integers.
#include "cuda/sale_estimate.cuh"
#include "cuda/sale_estimate_plan.h"
#include "simt/ops/common.h"

#include <deque>

namespace sparse_attn {
namespace {

template <int kWords, int kKeyTiles>
__global__ void sale_estimate_int4_kernel(const SaleEstimateCudaParams p) {
  SA_SHARED_MEMORY(memory);
  estimate<kWords, kKeyTiles, true>(p, memory);
}

SaleEstimateCudaParams params(const simt::Arguments& a) {
  SaleEstimateCudaParams p{};
  const auto &query = a.tensor("query_packed"), &key = a.tensor("key_packed");
  p.query = a.pointer<uint8_t>("query_packed"), p.key = a.pointer<uint8_t>("key_packed");
  strides(query, p.query_stride), strides(key, p.key_stride);
  p.query_step = a.pointer<float>("query_step"), p.key_step = a.pointer<float>("key_step");
  p.key_bias = a.pointer<float>("key_bias"), p.theta = a.pointer<float>("theta");
  p.B = query.sizes[0], p.Hq = query.sizes[1], p.Tq = query.sizes[2], p.D = 2 * query.sizes[3];
  p.Hkv = key.sizes[1], p.Tk = key.sizes[2];
  const auto number = [&](const char* name) { return static_cast<int64_t>(a.number(name)); };
  p.q_block = number("q_block"), p.kv_block = number("kv_block");
  p.Mq = ceil_div(p.Tq, p.q_block), p.Nk = ceil_div(p.Tk, p.kv_block);
  p.local_blocks = ceil_div(std::min(number("local"), p.Tk + 128), p.kv_block);
  p.sink_blocks = ceil_div(std::min(number("sink"), p.Tk), p.kv_block);
  p.indices = a.pointer<int32_t>("indices"), p.counts = a.pointer<int32_t>("counts");
  size_sale_estimate(p, limits(a));
  return p;
}

void run(const simt::Arguments& given) {
  simt::Arguments a = given;
  SaleEstimateCudaParams p = params(a);
  const SaleEstimatePlan plan = plan_sale_estimate(p);
  std::deque<simt::Workspace> buffers;  // one each, so that none is left by its end
  each_sale_estimate_buffer(p, plan, [&](const char* name, auto*& pointer, int64_t n) {
    buffers.emplace_back(a, name, static_cast<size_t>(n) * sizeof(*pointer));
    pointer = a.pointer<std::remove_reference_t<decltype(*pointer)>>(name);
  });
  launch<sale_prepare_kernel>(a, plan.prepare, p);
  launch<sale_invert_kernel>(a, plan.invert, p);
  if (plan.pads()) launch<sale_pad_kernel>(a, plan.pad, p);
  with_sale_codes(plan, [&]<int kWords, int kKeyTiles>() {
    if (a.seed % 2 == 1)
      launch<sale_estimate_int4_kernel<kWords, kKeyTiles>>(a, plan.estimate, p);
    else
      launch<sale_estimate_kernel<kWords, kKeyTiles>>(a, plan.estimate, p);
  });
  launch<sale_list_kernel>(a, plan.list, p);
}

void show_plan(const simt::Arguments& a) {
  SaleEstimateCudaParams p = params(a);
  const SaleEstimatePlan plan = plan_sale_estimate(p);
  place_sale_estimate_buffers(p, plan, a.pointer<char>("scratch"));
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("sale_estimate", run);
const simt::Register register_plan("sale_estimate_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
