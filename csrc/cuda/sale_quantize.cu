// Binds sale_quantize to torch.
#include "sale_quantize.cuh"

#include <tuple>

#include "../common/sale_quantize.h"
#include "binding.h"
#include "sale_quantize_plan.h"

namespace sparse_attn {
namespace {

template <class T>
void run(const SaleQuantizeCudaParams& p, cudaStream_t stream) {
  const SaleQuantizePlan plan = plan_sale_quantize(p);
  if (!p.mean_given) launch(sale_sum_kernel<T>, plan.sum, stream, p);
  launch(sale_mean_kernel, plan.mean, stream, p);
  launch(sale_code_kernel<T>, plan.code, stream, p);
}

std::tuple<Tensor, Tensor, Tensor> sale_quantize(Tensor x, std::optional<Tensor> mean,
                                                 std::string group, int64_t block) {
  check_sale_quantize(x, mean, block);
  check_same_device({{"x", x}, {"mean", mean.value_or(x)}});
  SA_CHECK(x.size(3) % 8 == 0 && x.size(3) <= 256, "x: head_dim ", x.size(3),
           ", expected a multiple of 8 up to 256");
  const DeviceGuard guard(x.get_device_index());
  x = aligned_rows(x);
  SaleQuantizeCudaParams p{
      sale_quantize_params(x, mean.has_value(), sale_group(group), block)};
  size_sale_quantize(p);
  Tensor packed = torch::stable::new_empty(x, {p.B, p.H, p.T, p.D / 2}, ScalarType::Byte);
  Tensor step = torch::stable::new_empty(x, {p.B, p.H, p.groups}, ScalarType::Float);
  Tensor center = torch::stable::new_empty(x, {p.B, p.H, p.D}, ScalarType::Float);
  if (mean) torch::stable::copy_(center, *mean);
  p.packed = packed.mutable_data_ptr<uint8_t>(), p.step = step.mutable_data_ptr<float>();
  p.center = center.mutable_data_ptr<float>();
  const int64_t bytes = place_sale_quantize_buffers(p, nullptr);
  Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  place_sale_quantize_buffers(p, static_cast<char*>(scratch.mutable_data_ptr()));
  switch (p.dtype) {
    case DType::f16: run<__half>(p, current_stream(x)); break;
    case DType::bf16: run<__nv_bfloat16>(p, current_stream(x)); break;
    case DType::f32: SA_CHECK(false, "x: expected float16 or bfloat16");
  }
  return {packed, step, center};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("sale_quantize.cuda", TORCH_BOX(&sale_quantize)); }

}  // namespace sparse_attn
