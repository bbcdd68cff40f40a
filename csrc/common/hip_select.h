// The checks of HiP's selections and their parameters, for the bindings of every device.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "hip_params.h"
#include "key_cache.h"
#include "stable.h"

namespace sparse_attn {

// A call through torch.ops has not been checked by anybody.
inline void check_hip_inputs(const Tensor& query, const Tensor& key, int64_t q_block, int64_t sink,
                             int64_t window, const std::string& representative,
                             std::optional<double> scale, const KeyCache& cache) {
  SA_CHECK(query.dim() == 4 && query.numel() > 0, "query: expected [B, Hq, Tq, D], not empty");
  SA_CHECK(key.dim() == 4 && key.numel() > 0, "key: expected [B, Hkv, Tk, D], not empty");
  dtype_of(query, "query");
  SA_CHECK(key.scalar_type() == query.scalar_type(), "key: dtype differs from query's");
  SA_CHECK(key.size(3) == query.size(3), "key: head_dim differs from query's");
  SA_CHECK(query.size(1) % key.size(1) == 0, "query: heads are no multiple of key's");
  check_key_cache(query, key, cache);
  check_lengths(query.size(2), cache.capacity(key));
  constexpr int64_t kLimit = (int64_t{1} << 31) - 256;
  SA_CHECK(q_block >= 1 && q_block <= 128, "q_block: got ", q_block, ", expected 1 to 128");
  SA_CHECK(sink >= 0 && sink <= kLimit, "sink: got ", sink, ", expected 0 to ", kLimit);
  SA_CHECK(window >= 0 && window <= kLimit, "window: got ", window, ", expected 0 to ", kLimit);
  SA_CHECK(representative == "centre" || representative == "first",
           "representative: got ", representative, ", expected centre or first");
  check_scale(scale);
}

// All but results and what only one of the two selections has; `cache` is a readable one.
inline void set_hip_params(HipParams& p, const Tensor& query, const Tensor& key, int64_t q_block,
                           int64_t kv_block, int64_t sink, int64_t window,
                           const std::string& representative, bool causal,
                           std::optional<double> scale, const KeyCache& cache) {
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.query_stride[i] = query.stride(i), p.key_stride[i] = key.stride(i);
  p.B = query.size(0), p.Hq = query.size(1), p.Tq = query.size(2), p.D = query.size(3);
  p.Hkv = key.size(1);
  p.Mq = (p.Tq + q_block - 1) / q_block;
  set_key_cache(p, key, cache);
  p.q_block = q_block, p.kv_block = kv_block, p.sink = sink, p.window = window;
  const double s = scale.value_or(1);
  p.sign = s > 0 ? 1.0f : s < 0 ? -1.0f : 0.0f;
  p.causal = causal, p.centre = representative == "centre";
  p.dtype = dtype_of(query, "query");
}

// What the tree search has beside that.
inline void set_hip_search(HipSelectParams& p, int64_t budget, int64_t q_stride,
                           int64_t key_stride, int64_t branch, bool share_kv_heads) {
  SA_CHECK(budget >= 1, "budget: got ", budget, ", expected 1 or more");
  SA_CHECK(p.kv_block >= 1 && p.kv_block <= 128, "kv_block: got ", p.kv_block,
           ", expected 1 to 128");
  SA_CHECK(q_stride >= 1 && q_stride <= 128, "q_stride: got ", q_stride, ", expected 1 to 128");
  SA_CHECK(key_stride >= 1 && key_stride <= 128, "key_stride: got ", key_stride,
           ", expected 1 to 128");
  SA_CHECK(branch == 2 || branch == 4, "branch: got ", branch, ", expected 2 or 4");
  // not (budget + kv_block - 1), which may overflow
  p.keep = std::min((budget - 1) / p.kv_block + 1, (p.Tk - 1) / p.kv_block + 1);
  p.q_stride = q_stride, p.key_step = key_stride, p.branch = branch;
  p.H = share_kv_heads ? p.Hkv : p.Hq, p.K = p.keep;
}

// What the stages have beside that.
inline void set_hip_stages(HipPruneParams& p, const std::vector<int64_t>& chunks,
                           const std::vector<int64_t>& keeps,
                           const std::vector<int64_t>& q_strides, const std::string& merge_heads) {
  p.stages = static_cast<int64_t>(chunks.size());
  SA_CHECK(p.stages >= 1 && p.stages <= kHipStages && keeps.size() == chunks.size() &&
               q_strides.size() == chunks.size(),
           "chunks, keeps, q_strides: expected one integer per stage, 1 to ", kHipStages, " stages");
  for (int64_t i = 0; i < p.stages; ++i) {
    const int64_t chunk = chunks[i];
    SA_CHECK(chunk >= 1 && chunk <= 4096 &&
                 (i == 0 || (chunk <= chunks[i - 1] && chunks[i - 1] % chunk == 0)),
             "chunks[", i, "]: got ", chunk, ", expected 1 to 4096 that divides the one before");
    SA_CHECK(keeps[i] >= 1, "keeps[", i, "]: got ", keeps[i], ", expected 1 or more");
    SA_CHECK(q_strides[i] >= 1 && q_strides[i] <= 128, "q_strides[", i, "]: got ", q_strides[i],
             ", expected 1 to 128");
    p.chunk[i] = chunk, p.q_stride[i] = q_strides[i];
    p.keep[i] = (keeps[i] - 1) / chunk + 1;
  }
  SA_CHECK(chunks.back() <= 128, "chunks[-1]: got ", chunks.back(), ", expected 1 to 128");
  SA_CHECK(merge_heads == "none" || merge_heads == "group" || merge_heads == "all",
           "merge_heads: got ", merge_heads, ", expected none, group or all");
  p.H = merge_heads == "none" ? p.Hq : merge_heads == "group" ? p.Hkv : 1;
  p.K = std::min(p.keep[p.stages - 1], (p.Tk - 1) / p.kv_block + 1);
}

// [B, H, Mq, K] and [B, H, Mq]
inline std::pair<Tensor, Tensor> empty_hip_index(HipParams& p, const Tensor& query) {
  Tensor indices = torch::stable::new_empty(query, {p.B, p.H, p.Mq, p.K}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(query, {p.B, p.H, p.Mq}, ScalarType::Int);
  p.indices = indices.mutable_data_ptr<int32_t>();
  p.counts = counts.mutable_data_ptr<int32_t>();
  return {indices, counts};
}

}  // namespace sparse_attn
