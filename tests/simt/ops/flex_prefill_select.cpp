// flex_prefill_select, and what its plan says. Outputs with the name of a part of the scratch
// memory receive that.
#include "cuda/flex_prefill_select.cuh"
#include "cuda/flex_prefill_select_plan.h"
#include "simt/ops/common.h"

#include <deque>

namespace sparse_attn {
namespace {

FlexPrefillCudaParams params(const simt::Arguments& a) {
  FlexPrefillCudaParams p{};
  p.query = a.pointer<void>("query"), p.key = a.pointer<void>("key");
  strides(a.tensor("query"), p.query_stride), strides(a.tensor("key"), p.key_stride);
  const auto &query = a.tensor("query").sizes, &key = a.tensor("key").sizes;
  p.B = query[0], p.Hq = query[1], p.Tq = query[2], p.D = query[3];
  p.Hkv = key[1], p.Tk = key[2];
  p.block = static_cast<int64_t>(a.number("block_size"));
  p.probe = std::min({p.block, p.Tq, p.Tk});
  p.scale = static_cast<float>(a.number("scale", 1 / std::sqrt(static_cast<double>(p.D))));
  p.dtype = dtype(a);
  p.gamma = static_cast<float>(a.number("gamma")), p.tau = static_cast<float>(a.number("tau"));
  size_flex_prefill(p, static_cast<int64_t>(a.number("min_budget")),
                    static_cast<int64_t>(a.number("max_budget", -1)));
  p.indices = a.pointer<int32_t>("indices"), p.counts = a.pointer<int32_t>("counts");
  p.pattern = a.pointer<int32_t>("pattern");
  return p;
}

template <class T>
void run_as(const simt::Arguments& given) {
  simt::Arguments a = given;
  FlexPrefillCudaParams p = params(a);
  const FlexPrefillPlan plan = plan_flex_prefill_select(p);
  std::deque<simt::Workspace> buffers;  // one each, so that none is left by its end
  each_flex_prefill_buffer(p, plan, [&](const char* name, auto*& pointer, int64_t n) {
    const auto bytes = static_cast<size_t>(n) * sizeof(*pointer);
    if (a.tensors.count(name) == 0) buffers.emplace_back(a, name, bytes);
    if (a.tensor(name).bytes() != bytes) throw std::runtime_error(name + std::string(": size"));
    pointer = a.pointer<std::remove_reference_t<decltype(*pointer)>>(name);
  });
  if (plan.chooses) {
    launch<block_mean_kernel<T, false>>(a, plan.mean_key, p);
    launch<probe_extent_kernel<T>>(a, plan.extent, p);
    launch<probe_profile_kernel<T, false>>(a, plan.profile, p);
    launch<probe_profile_kernel<T, true>>(a, plan.attribute, p);
    launch<block_sum_kernel<T>>(a, plan.block_sum, p);
    launch<choose_kernel>(a, plan.choose, p);
  }
  if (plan.per_row) {
    launch<block_mean_kernel<T, true>>(a, plan.mean_query, p);
    launch<block_score_kernel>(a, plan.block_score, p);
  }
  launch<list_kernel>(a, plan.list, p);
}

void run(const simt::Arguments& a) {
  if (dtype(a) == DType::f16)
    run_as<__half>(a);
  else
    run_as<__nv_bfloat16>(a);
}

void show_plan(const simt::Arguments& a) {
  FlexPrefillCudaParams p = params(a);
  const FlexPrefillPlan plan = plan_flex_prefill_select(p);
  place_flex_prefill_buffers(p, plan, a.pointer<char>("scratch"));
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("flex_prefill_select", run);
const simt::Register register_plan("flex_prefill_select_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
