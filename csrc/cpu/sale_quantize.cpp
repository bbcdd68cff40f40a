// SALE's 4-bit copies: sparse_attn/reference/sale_quantize.py says what.
#include "sale_quantize.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "../common/sale_quantize.h"
#include "cpu_isa.h"
#include "threads.h"

namespace sparse_attn {
namespace {

using Params = SaleQuantizeParams;

const QuantizeKernel& choose_kernel() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return kQuantizeAvx512;
  if (isa == CpuIsa::avx2) return kQuantizeAvx2;
#endif
  return kQuantizePortable;
}

// Pieces of tokens are summed by themselves and added in order: threads do not show.
void find_mean(const Params& p, const QuantizeKernel& kernel) {
  const int64_t pieces = (p.T + kQuantizePiece - 1) / kQuantizePiece, heads = p.B * p.H;
  std::vector<float> sums(heads * pieces * p.D);
  deal(heads * pieces, [] { return 0; }, [&](int64_t i, int) {
    const int64_t head = i / pieces, begin = i % pieces * kQuantizePiece;
    kernel.sum(p, head / p.H, head % p.H, begin, std::min(p.T, begin + kQuantizePiece),
               &sums[i * p.D]);
  });
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t d = 0; d < p.D; ++d) {
      double total = 0;
      for (int64_t i = 0; i < pieces; ++i) total += sums[(head * pieces + i) * p.D + d];
      p.center[head * p.D + d] = static_cast<float>(total / static_cast<double>(p.T));
    }
  }
}

// 2^-16 of the largest |mean|; NaN over infinity over every number
float floor_of(const float* center, int64_t n) {
  float top = 0;
  for (int64_t d = 0; d < n; ++d) {
    if (std::isnan(center[d])) return std::fabs(center[d]);
    top = std::max(top, std::fabs(center[d]));
  }
  return top * 0x1p-16f;
}

void run(const Params& p, const QuantizeKernel& kernel) {
  if (!p.mean_given) find_mean(p, kernel);
  const int64_t pieces = (p.T + kQuantizePiece - 1) / kQuantizePiece;
  std::vector<float> floors(p.B * p.H);
  for (int64_t i = 0; i < p.B * p.H; ++i) floors[i] = floor_of(p.center + i * p.D, p.D);
  deal(p.B * p.H * pieces,
       [&] { return allocate(kernel.scratch_floats(p) * static_cast<int64_t>(sizeof(float))); },
       [&](int64_t i, const Buffer& scratch) {
         const int64_t head = i / pieces, begin = i % pieces * kQuantizePiece;
         kernel.quantize(p, head / p.H, head % p.H, begin, std::min(p.T, begin + kQuantizePiece),
                         p.center + head * p.D, floors[head], floats(scratch));
       });
}

std::tuple<Tensor, Tensor, Tensor> sale_quantize(Tensor x, std::optional<Tensor> mean,
                                                 std::string group, int64_t block) {
  check_sale_quantize(x, mean, block);
  SA_CHECK(x.is_cpu() && (!mean || mean->is_cpu()), "x, mean: expected CPU tensors");
  x = last_dim_contiguous(x);
  Params p = sale_quantize_params(x, mean.has_value(), sale_group(group), block);
  Tensor packed = torch::stable::new_empty(x, {p.B, p.H, p.T, p.D / 2}, ScalarType::Byte);
  Tensor step = torch::stable::new_empty(x, {p.B, p.H, p.groups}, ScalarType::Float);
  Tensor center = torch::stable::new_empty(x, {p.B, p.H, p.D}, ScalarType::Float);
  if (mean) torch::stable::copy_(center, *mean);
  p.packed = packed.mutable_data_ptr<uint8_t>(), p.step = step.mutable_data_ptr<float>();
  p.center = center.mutable_data_ptr<float>();
  run(p, choose_kernel());
  return {packed, step, center};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) { m.impl("sale_quantize.cpp", TORCH_BOX(&sale_quantize)); }

}  // namespace sparse_attn
