// Binds squeezed_attend to torch.
#include <tuple>

#include "../common/squeezed_attend.h"
#include "binding.h"
#include "squeezed_attend.cuh"
#include "squeezed_attend_plan.h"

namespace sparse_attn {
namespace {

template <class T>
void run(const SqueezedAttendCudaParams& p, const SqueezedAttendPlan& plan, cudaStream_t stream) {
  with_attention_tile(plan, [&]<int kDim, int kRows>() {
    launch(squeezed_attend_kernel<T, kDim, kRows>, plan.launch, stream, p);
  });
}

std::tuple<Tensor, Tensor> squeezed_attend(Tensor query, Tensor key, Tensor value, Tensor tail_key,
                                           Tensor tail_value, Tensor starts, Tensor sums,
                                           Tensor counts, std::optional<Tensor> tail_lengths,
                                           std::optional<double> scale) {
  const Tensor* const lengths = tail_lengths.has_value() ? &*tail_lengths : nullptr;
  check_squeezed_attend(query, key, value, tail_key, tail_value, starts, sums, counts, lengths,
                        scale);
  check_same_device({{"query", query}, {"key", key}, {"value", value}, {"tail_key", tail_key},
                     {"tail_value", tail_value}, {"starts", starts}, {"sums", sums},
                     {"counts", counts}, {"tail_lengths", tail_lengths.value_or(counts)}});
  for (const Tensor* t : {&query, &value})
    SA_CHECK(t->size(3) % 8 == 0 && t->size(3) <= 256,
             "query, value: head_dim ", t->size(3), ", expected a multiple of 8, at most 256");
  SA_CHECK(std::max({query.size(2), key.size(2), tail_key.size(2)}) < int64_t{1} << 30,
           "query, key, tail_key: expected less than 2**30 tokens");
  const DeviceGuard guard(query.get_device_index());
  query = aligned_rows(query), key = aligned_rows(key), value = aligned_rows(value);
  tail_key = aligned_rows(tail_key), tail_value = aligned_rows(tail_value);
  starts = last_dim_contiguous(starts), sums = last_dim_contiguous(sums);
  if (lengths != nullptr) tail_lengths = last_dim_contiguous(*tail_lengths);
  SqueezedAttendCall c{squeezed_attend_params(query, key, value, tail_key, tail_value, starts, sums,
                                              counts, lengths, scale)};
  Tensor out = torch::stable::new_empty(query, {c.B, c.Hq, c.Tq, c.Dv});
  Tensor lse = torch::stable::new_empty(query, {c.B, c.Hq, c.Tq}, ScalarType::Float);
  c.out = out.mutable_data_ptr(), c.lse = lse.mutable_data_ptr<float>();
  for (int i = 0; i < 3; ++i) c.out_stride[i] = out.stride(i);

  const SqueezedAttendPlan plan = plan_squeezed_attend(c, limits_of(query));
  const cudaStream_t stream = current_stream(query);
  Tensor workspace = torch::stable::new_empty(query, {plan.workspace_bytes()}, ScalarType::Byte);
  const auto p = plan.params(c, workspace.mutable_data_ptr());
  SA_CUDA_CHECK(cudaMemsetAsync(p.done, 0, plan.done_bytes, stream));
  switch (c.dtype) {
    case DType::f16: run<__half>(p, plan, stream); break;
    case DType::bf16: run<__nv_bfloat16>(p, plan, stream); break;
    case DType::f32: SA_CHECK(false, "query: expected float16 or bfloat16");
  }
  return {out, lse};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("squeezed_attend.cuda", TORCH_BOX(&squeezed_attend)); }

}  // namespace sparse_attn
