// block_sparse_attention, and what its plan says.
#include "cuda/block_sparse_attention.cuh"
#include "cuda/block_sparse_attention_plan.h"
#include "simt/ops/common.h"

namespace sparse_attn {
namespace {

BlockSparseAttentionParams call_of(const simt::Arguments& a) {
  const auto &query = a.tensor("query"), &key = a.tensor("key"), &value = a.tensor("value");
  const auto &indices = a.tensor("indices"), &out = a.tensor("out");
  const auto integer = [&](const char* name) { return static_cast<int64_t>(a.number(name)); };
  BlockSparseAttentionParams p{};
  p.query = query.data, p.key = key.data, p.value = value.data;
  p.indices = a.pointer<int32_t>("indices"), p.counts = a.pointer<int32_t>("counts");
  p.out = out.data, p.lse = a.pointer<float>("lse");
  strides(query, p.query_stride), strides(key, p.key_stride), strides(value, p.value_stride);
  strides(out, p.out_stride), strides(indices, p.indices_stride);
  strides(a.tensor("counts"), p.counts_stride);
  p.B = query.sizes[0], p.Hq = query.sizes[1], p.Tq = query.sizes[2], p.D = query.sizes[3];
  p.Hkv = key.sizes[1], p.Tk = key.sizes[2], p.Dv = value.sizes[3];
  p.Hi = indices.sizes[1], p.Mq = indices.sizes[2], p.K = indices.sizes[3];
  p.q_block = integer("q_block"), p.kv_block = integer("kv_block");
  p.sink = integer("sink"), p.window = integer("window"), p.causal = integer("causal") != 0;
  p.scale = static_cast<float>(a.number("scale", 1 / std::sqrt(static_cast<double>(p.D))));
  p.dtype = dtype(a);
  p.kv_lengths = optional<int32_t>(a, "kv_lengths");
  p.block_table = optional<int32_t>(a, "block_table");
  if (p.block_table != nullptr) {
    const auto& table = a.tensor("block_table");
    p.block_table_stride = table.strides[0], p.pages = key.sizes[0];
    while (key.sizes[2] >> p.page_bits > 1) ++p.page_bits;
    p.Tk = table.sizes[1] << p.page_bits;
  }
  return p;
}

template <class T>
void run_as(const simt::Arguments& a, const BlockSparseAttentionCudaParams& p,
            const BlockSparseAttentionPlan& plan) {
  with_attention_tile(plan, [&]<int kDim, int kRows>() {
    launch<block_sparse_attention_kernel<T, kDim, kRows>>(a, plan.launch, p);
  });
}

void run(const simt::Arguments& arguments) {
  simt::Arguments a = arguments;
  const BlockSparseAttentionParams call = call_of(a);
  const BlockSparseAttentionPlan plan = plan_block_sparse_attention(call, limits(a));
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
  const BlockSparseAttentionParams call = call_of(a);
  const BlockSparseAttentionPlan plan = plan_block_sparse_attention(call, limits(a));
  a.give("params", plan.params(call, a.pointer<void>("scratch"))), a.give("plan", plan);
}

const simt::Register register_run("block_sparse_attention", run);
const simt::Register register_plan("block_sparse_attention_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
