// block_sparse_attention as its binding launches it.
#include "cuda/block_sparse_attention.cuh"
#include "cuda/block_sparse_attention_plan.h"
#include "simt/host.h"

namespace {

using namespace sparse_attn;

void strides(int64_t (&to)[3], const simt::Tensor& t) {
  for (int i = 0; i < 3; ++i) to[i] = t.strides[i];
}

BlockSparseAttentionParams call_of(const simt::Arguments& a) {
  const auto &query = a.tensor("query"), &key = a.tensor("key"), &value = a.tensor("value");
  const auto &indices = a.tensor("indices"), &counts = a.tensor("counts");
  BlockSparseAttentionParams p{};
  p.query = query.data, p.key = key.data, p.value = value.data;
  p.indices = a.pointer<const int32_t>("indices"), p.counts = a.pointer<const int32_t>("counts");
  p.out = a.tensor("out").data, p.lse = a.pointer<float>("lse");
  strides(p.query_stride, query), strides(p.key_stride, key), strides(p.value_stride, value);
  strides(p.out_stride, a.tensor("out"));
  strides(p.indices_stride, indices), strides(p.counts_stride, counts);
  p.B = query.sizes[0], p.Hq = query.sizes[1], p.Tq = query.sizes[2], p.D = query.sizes[3];
  p.Hkv = key.sizes[1], p.Tk = key.sizes[2], p.Dv = value.sizes[3];
  p.Hi = indices.sizes[1], p.Mq = indices.sizes[2], p.K = indices.sizes[3];
  const auto integer = [&](const char* name) { return static_cast<int64_t>(a.number(name)); };
  p.q_block = integer("q_block"), p.kv_block = integer("kv_block");
  p.sink = integer("sink"), p.window = integer("window");
  p.scale = static_cast<float>(a.number("scale")), p.causal = a.number("causal") != 0;
  p.dtype = a.number("bf16") != 0 ? DType::bf16 : DType::f16;
  return p;
}

// Scratch memory that holds nothing yet: NaN.
float* scratch(simt::Arguments& a, const char* name, std::vector<float>& memory, int64_t n) {
  memory.assign(static_cast<size_t>(n), NAN);
  a.tensors[name] = {reinterpret_cast<char*>(memory.data()), {n}, {1}, 4, true};
  return memory.data();
}

template <class T, int kDim, int kRows>
void launch(const simt::Arguments& a, const BlockSparseAttentionCudaParams& p,
            const BlockSparseAttentionPlan& plan) {
  simt::launch<block_sparse_attention_kernel<T, kDim, kRows>>(
      a, {.x = static_cast<uint32_t>(plan.grid())},
      {.x = static_cast<uint32_t>(plan.tile.threads())},
      static_cast<size_t>(plan.tile.shared_bytes()), p);
}

template <class T, int kDim>
void launch_rows(const simt::Arguments& a, const BlockSparseAttentionCudaParams& p,
                 const BlockSparseAttentionPlan& plan) {
  if (plan.tile.rows == 16) return launch<T, kDim, 16>(a, p, plan);
  if (plan.tile.rows == 64) return launch<T, kDim, 64>(a, p, plan);
  if constexpr (kDim <= 128) launch<T, kDim, 128>(a, p, plan);
}

template <class T>
void launch_dim(const simt::Arguments& a, const BlockSparseAttentionCudaParams& p,
                const BlockSparseAttentionPlan& plan) {
  switch (plan.tile.dim) {
    case 64: return launch_rows<T, 64>(a, p, plan);
    case 96: return launch_rows<T, 96>(a, p, plan);
    case 128: return launch_rows<T, 128>(a, p, plan);
    default: return launch_rows<T, 256>(a, p, plan);
  }
}

void attend(const simt::Arguments& arguments) {
  simt::Arguments a = arguments;
  BlockSparseAttentionCudaParams p{call_of(a)};
  const auto plan =
      plan_block_sparse_attention(p.call, static_cast<int64_t>(a.number("processors")));
  plan.fill(p);
  std::vector<float> values, stats, done;
  p.part_values = scratch(a, "part_values", values, plan.part_rows * p.call.Dv);
  p.part_stats = scratch(a, "part_stats", stats, plan.part_rows * 2);
  p.done = reinterpret_cast<int32_t*>(scratch(a, "done", done, plan.tiles));
  std::fill_n(p.done, plan.tiles, 0);
  p.call.dtype == DType::bf16 ? launch_dim<__nv_bfloat16>(a, p, plan)
                              : launch_dim<__half>(a, p, plan);
}

const simt::Register registered("block_sparse_attention", attend);

}  // namespace
