// What every driver of the attention kernels needs: their choice, splits over keys, the join.
#pragma once
#include <cmath>
#include <limits>

#include "block_sparse_attention.h"
#include "cpu_isa.h"
#include "dtype_convert.h"

namespace sparse_attn {

constexpr int64_t kSplitGroups = 128;   // keys per split: 128 groups of 32
constexpr int64_t kSplitBelow = 64;     // calls with fewer tiles are split over keys

struct Kernels {
  const AttentionKernel* prefill;
  const AttentionKernel* decode;
  int64_t decode_rows = 4;  // up to here the decode kernel beats a mostly empty tile
};

inline Kernels choose_kernels(const BlockSparseAttentionParams& p) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  const bool bf16 = p.dtype == DType::bf16;
  if (isa == CpuIsa::amx && bf16) return {&kAttentionAmx, &kDecodeAvx512Bf16, 8};
  if (isa == CpuIsa::avx512bf16 && bf16) return {&kAttentionAvx512Bf16, &kDecodeAvx512Bf16, 8};
  if (isa >= CpuIsa::avx512) return {&kAttentionAvx512, &kDecodeAvx512};
  if (isa == CpuIsa::avx2) return {&kAttentionAvx2, &kDecodeAvx2};
#endif
  return {&kAttentionPortable, &kDecodePortable};
}

// Joins the partial results of the splits of one row.
inline void combine_row(const BlockSparseAttentionParams& p, const float* const* parts,
                        int64_t n_parts, int64_t batch, int64_t head, int64_t query, float* sum) {
  float top = kNoKey;
  for (int64_t s = 0; s < n_parts; ++s) top = std::max(top, parts[s][p.Dv]);
  float total = 0;
  std::fill(sum, sum + p.Dv, 0.0f);
  for (int64_t s = 0; s < n_parts; ++s) {
    const float w = std::exp(parts[s][p.Dv] - top), l = parts[s][p.Dv + 1];
    if (l == 0) continue;
    total += w * l;
    for (int64_t d = 0; d < p.Dv; ++d) sum[d] += w * parts[s][d];
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  p.lse[(batch * p.Hq + head) * p.Tq + query] =
      total == 0 ? -std::numeric_limits<float>::infinity() : top + std::log(total);
  const int64_t at = batch * p.out_stride[0] + head * p.out_stride[1] + query * p.out_stride[2];
  for (int64_t d = 0; d < p.Dv; ++d) store_as(p.dtype, p.out, at + d, sum[d] * inverse);
}

}  // namespace sparse_attn
