// squeezed_attend, and what its plan says.
#include "cuda/squeezed_attend.cuh"
#include "cuda/squeezed_attend_plan.h"
#include "simt/ops/common.h"

namespace sparse_attn {
namespace {

SqueezedAttendCall call_of(const simt::Arguments& a) {
  const auto &query = a.tensor("query"), &key = a.tensor("key"), &value = a.tensor("value");
  const auto &tail_key = a.tensor("tail_key"), &tail_value = a.tensor("tail_value");
  const auto &starts = a.tensor("starts"), &sums = a.tensor("sums"), &out = a.tensor("out");
  SqueezedAttendCall c{};
  c.query = query.data, c.key = key.data, c.value = value.data;
  c.tail_key = tail_key.data, c.tail_value = tail_value.data;
  c.out = out.data, c.lse = a.pointer<float>("lse");
  strides(query, c.query_stride), strides(out, c.out_stride);
  strides(key, c.key_stride), strides(value, c.value_stride);
  strides(tail_key, c.tail_key_stride), strides(tail_value, c.tail_value_stride);
  if (key.sizes[0] == 1) c.key_stride[0] = c.value_stride[0] = 0;
  c.starts = a.pointer<int32_t>("starts"), c.sums = a.pointer<int32_t>("sums");
  c.counts = a.pointer<int32_t>("counts");
  if (a.tensors.count("tail_lengths") != 0) c.tail_lengths = a.pointer<int32_t>("tail_lengths");
  for (int i = 0; i < 2; ++i) {
    c.starts_stride[i] = starts.strides[i], c.sums_stride[i] = sums.strides[i];
    c.counts_stride[i] = a.tensor("counts").strides[i];
  }
  c.B = query.sizes[0], c.Hq = query.sizes[1], c.Tq = query.sizes[2], c.D = query.sizes[3];
  c.Hkv = key.sizes[1], c.Tk = key.sizes[2], c.Dv = value.sizes[3], c.N = tail_key.sizes[2];
  c.Hd = starts.sizes[1], c.runs = starts.sizes[2];
  c.scale = static_cast<float>(a.number("scale", 1 / std::sqrt(static_cast<double>(c.D))));
  c.dtype = dtype(a);
  return c;
}

template <class T>
void run_as(const simt::Arguments& a, const SqueezedAttendCudaParams& p,
            const SqueezedAttendPlan& plan) {
  with_attention_tile(plan, [&]<int kDim, int kRows>() {
    launch<squeezed_attend_kernel<T, kDim, kRows>>(a, plan.launch, p);
  });
}

void run(const simt::Arguments& arguments) {
  simt::Arguments a = arguments;
  const SqueezedAttendCall call = call_of(a);
  const SqueezedAttendPlan plan = plan_squeezed_attend(call, limits(a));
  const simt::Workspace workspace(a, "workspace", static_cast<size_t>(plan.workspace_bytes()));
  const auto p = plan.params(call, a.pointer<void>("workspace"));
  std::memset(p.done, 0, static_cast<size_t>(plan.done_bytes));
  switch (dtype(a)) {
    case DType::f16: run_as<__half>(a, p, plan); break;
    case DType::bf16: run_as<__nv_bfloat16>(a, p, plan); break;
    case DType::f32: throw std::runtime_error("no float32");
  }
}

void show_plan(const simt::Arguments& a) {
  const SqueezedAttendCall call = call_of(a);
  const SqueezedAttendPlan plan = plan_squeezed_attend(call, limits(a));
  a.give("params", plan.params(call, a.pointer<void>("scratch"))), a.give("plan", plan);
}

const simt::Register register_run("squeezed_attend", run);
const simt::Register register_plan("squeezed_attend_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
