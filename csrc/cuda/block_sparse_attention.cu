// Binds block_sparse_attention to torch.
#include <tuple>

#include "../common/block_sparse_attention.h"
#include "binding.h"
#include "block_sparse_attention.cuh"
#include "block_sparse_attention_plan.h"

namespace sparse_attn {
namespace {

template <class T>
void run(const BlockSparseAttentionCudaParams& p, const BlockSparseAttentionPlan& plan,
         cudaStream_t stream) {
  with_attention_tile(plan, [&]<int kDim, int kRows>() {
    launch(block_sparse_attention_kernel<T, kDim, kRows>, plan.launch, stream, p);
  });
}

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor query, Tensor key, Tensor value,
                                                  Tensor indices, Tensor counts, int64_t q_block,
                                                  int64_t kv_block, bool causal, int64_t sink,
                                                  int64_t window, std::optional<double> scale,
                                                  std::optional<Tensor> block_table,
                                                  std::optional<Tensor> kv_lengths) {
  KeyCache cache{block_table, kv_lengths};
  check_block_sparse_attention(query, key, value, indices, counts, q_block, kv_block, sink, window,
                               scale, cache);
  for (const auto* t : {&cache.block_table, &cache.kv_lengths})
    if (t->has_value()) check_same_device({{"query", query}, {"block_table, kv_lengths", **t}});
  check_same_device({{"query", query}, {"key", key}, {"value", value},
                     {"indices", indices}, {"counts", counts}});
  for (const Tensor* t : {&query, &value})
    SA_CHECK(t->size(3) % 8 == 0 && t->size(3) <= 256,
             "query, value: head_dim ", t->size(3), ", expected a multiple of 8, at most 256");
  SA_CHECK(std::max(query.size(2), cache.capacity(key)) < int64_t{1} << 30,
           "query, key: lengths ", query.size(2), " and ", cache.capacity(key),
           ", expected less than 2**30");
  if (cache.block_table.has_value())
    SA_CHECK(rows_are_aligned(key) && rows_are_aligned(value) &&
                 key.size(0) * key.size(2) < int64_t{1} << 31,
             "key, value: pages must begin at multiples of 16 bytes, with less than 2**31 tokens");
  const DeviceGuard guard(query.get_device_index());
  query = aligned_rows(query), key = aligned_rows(key);
  value = aligned_rows(value), indices = last_dim_contiguous(indices);
  cache = readable(cache);
  const int64_t B = query.size(0), Hq = query.size(1), Tq = query.size(2);
  Tensor out = torch::stable::new_empty(query, {B, Hq, Tq, value.size(3)});
  Tensor lse = torch::stable::new_empty(query, {B, Hq, Tq}, ScalarType::Float);
  auto call = block_sparse_attention_inputs(query, key, value, indices, counts, scale, cache);
  set_results(call, out, lse);
  call.q_block = q_block, call.kv_block = kv_block, call.causal = causal;
  call.sink = sink, call.window = window;

  const BlockSparseAttentionPlan plan = plan_block_sparse_attention(call, limits_of(query));
  const cudaStream_t stream = current_stream(query);
  Tensor workspace =
      torch::stable::new_empty(query, {plan.workspace_bytes()}, ScalarType::Byte);
  const auto p = plan.params(call, workspace.mutable_data_ptr());
  if (plan.splits > 1) SA_CUDA_CHECK(cudaMemsetAsync(p.done, 0, plan.done_bytes, stream));
  switch (call.dtype) {
    case DType::f16: run<__half>(p, plan, stream); break;
    case DType::bf16: run<__nv_bfloat16>(p, plan, stream); break;
    case DType::f32: SA_CHECK(false, "query: expected float16 or bfloat16");
  }
  return {out, lse};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) {
  m.impl("block_sparse_attention.cuda", TORCH_BOX(&block_sparse_attention));
}

}  // namespace sparse_attn
