// Binds sale_estimate to torch.
#include "sale_estimate.cuh"

#include <tuple>

#include "../common/sale_estimate.h"
#include "binding.h"
#include "sale_estimate_plan.h"

namespace sparse_attn {
namespace {

// Rows of uint8 that begin at multiples of 16 bytes, or as near as their length allows.
Tensor aligned_bytes(const Tensor& t) {
  const Tensor x = last_dim_contiguous(t);
  const int64_t step = x.size(3) % 16 == 0 ? 16 : 4;
  bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % step == 0;
  for (int64_t i = 0; i < 3; ++i) fits = fits && (x.size(i) == 1 || x.stride(i) % step == 0);
  return fits ? x : torch::stable::contiguous(torch::stable::clone(x));
}

std::tuple<Tensor, Tensor> sale_estimate(Tensor query_packed, Tensor query_step, Tensor key_packed,
                                         Tensor key_step, Tensor key_bias, Tensor theta,
                                         int64_t q_block, int64_t kv_block, int64_t local,
                                         int64_t sink) {
  SaleEstimateTensors t{query_packed, query_step, key_packed, key_step, key_bias, theta};
  check_sale_estimate(t, q_block, kv_block, local, sink);
  check_same_device({{"query_packed", t.query}, {"query_step", t.query_step},
                     {"key_packed", t.key}, {"key_step", t.key_step}, {"key_bias", t.key_bias},
                     {"theta", t.theta}});
  const int64_t bytes_per_row = t.query.size(3);
  SA_CHECK(bytes_per_row % 4 == 0 && bytes_per_row <= 128, "query_packed: head_dim ",
           2 * bytes_per_row, ", expected a multiple of 8 up to 256");
  const DeviceGuard guard(t.query.get_device_index());
  for (Tensor* x : {&t.query, &t.key}) *x = aligned_bytes(*x);
  for (Tensor* x : {&t.query_step, &t.key_step, &t.key_bias, &t.theta})
    *x = torch::stable::contiguous(*x);
  SaleEstimateCudaParams p{sale_estimate_params(t, q_block, kv_block, local, sink)};
  size_sale_estimate(p, limits_of(t.query));
  const SaleEstimatePlan plan = plan_sale_estimate(p);
  Tensor indices = torch::stable::new_empty(t.query, {p.B, p.Hq, p.Mq, p.Nk}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(t.query, {p.B, p.Hq, p.Mq}, ScalarType::Int);
  p.indices = indices.mutable_data_ptr<int32_t>(), p.counts = counts.mutable_data_ptr<int32_t>();
  const int64_t bytes = place_sale_estimate_buffers(p, plan, nullptr);
  Tensor scratch = torch::stable::new_empty(t.query, {bytes}, ScalarType::Byte);
  place_sale_estimate_buffers(p, plan, static_cast<char*>(scratch.mutable_data_ptr()));
  const cudaStream_t stream = current_stream(t.query);
  launch(sale_prepare_kernel, plan.prepare, stream, p);
  launch(sale_invert_kernel, plan.invert, stream, p);
  if (plan.pads()) launch(sale_pad_kernel, plan.pad, stream, p);
  with_sale_codes(plan, [&]<int kWords, int kKeyTiles>() {
    launch(sale_estimate_kernel<kWords, kKeyTiles>, plan.estimate, stream, p);
  });
  launch(sale_list_kernel, plan.list, stream, p);
  return {indices, counts};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("sale_estimate.cuda", TORCH_BOX(&sale_estimate)); }

}  // namespace sparse_attn
