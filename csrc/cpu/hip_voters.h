// What the drivers of HiP's two selections have in common.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "../common/hip_select.h"
#include "cache_contents.h"
#include "cpu_isa.h"
#include "hip_score.h"
#include "threads.h"

namespace sparse_attn {

inline const HipScoreKernel& choose_hip_kernel(const HipParams& p) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512bf16 && p.dtype == DType::bf16 && p.D % 2 == 0)
    return kHipScoreAvx512Bf16;
  if (isa >= CpuIsa::avx512) return kHipScoreAvx512;
  if (isa == CpuIsa::avx2) return kHipScoreAvx2;
#endif
  return kHipScorePortable;
}

// Checks a call, fills in what both selections have, and returns query and key as they are read.
inline std::pair<Tensor, Tensor> hip_inputs(HipParams& p, const Tensor& query, const Tensor& key,
                                            int64_t q_block, int64_t kv_block, int64_t sink,
                                            int64_t window, const std::string& representative,
                                            bool causal, std::optional<double> scale,
                                            std::optional<Tensor>& block_table,
                                            std::optional<Tensor>& kv_lengths) {
  KeyCache cache{block_table, kv_lengths};
  check_hip_inputs(query, key, q_block, sink, window, representative, scale, cache);
  for (const Tensor& x : {query, key, block_table.value_or(query), kv_lengths.value_or(query)})
    SA_CHECK(x.is_cpu(), "query, key, block_table, kv_lengths: expected CPU tensors");
  cache = readable(cache), block_table = cache.block_table, kv_lengths = cache.kv_lengths;
  const Tensor q = last_dim_contiguous(query), k = last_dim_contiguous(key);
  set_hip_params(p, q, k, q_block, kv_block, sink, window, representative, causal, scale,
                 cache);
  check_cache_contents(p);
  return {q, k};
}

// One block of queries of a head, or of the heads that choose together.
struct HipTask {
  int64_t batch, head, block;  // head of the index

  int64_t row(const HipParams& p) const { return (batch * p.H + head) * p.Mq + block; }
};

inline HipTask hip_task(const HipParams& p, int64_t i) {
  return {i / (p.H * p.Mq), i / p.Mq % p.H, i % p.Mq};
}

inline int64_t keys_of(const HipParams& p, int64_t batch) {
  return p.kv_lengths == nullptr ? p.Tk : p.kv_lengths[batch];
}

inline HipKeys hip_keys(const HipParams& p, int64_t batch, int64_t kv_head) {
  const int64_t bytes = element_bytes(p.dtype);
  const bool paged = p.block_table != nullptr;
  const int64_t at = (paged ? 0 : batch * p.key_stride[0]) + kv_head * p.key_stride[1];
  return {static_cast<const char*>(p.key) + at * bytes,
          p.key_stride[2] * bytes,
          p.key_stride[0] * bytes,
          paged ? p.block_table + batch * p.block_table_stride : nullptr,
          static_cast<int>(p.page_bits),
          static_cast<int32_t>(keys_of(p, batch))};
}

// The keys [0, end) that the last query of a block searches.
inline int64_t hip_end(const HipParams& p, const HipTask& t) {
  const int64_t n = keys_of(p, t.batch), last = std::min((t.block + 1) * p.q_block, p.Tq) - 1;
  return p.causal ? std::max<int64_t>(0, n - p.Tq + last - p.window + 1) : n;
}

// The voting queries of some heads, packed for the kernel.
class HipPacked {
 public:
  HipPacked(const HipParams& p, const HipScoreKernel& kernel, int64_t most)
      : p_(p), kernel_(kernel), scratch_(allocate(kernel.scratch_bytes(p, most))) {}

  // queries of `heads` heads from `head` on: every stride-th, counted back from the block's last
  void gather(const HipTask& t, int64_t head, int64_t heads, int64_t stride) {
    const int64_t first = t.block * p_.q_block, n = keys_of(p_, t.batch);
    const int64_t last = std::min(first + p_.q_block, p_.Tq) - 1;
    rows_.clear(), limits_.clear();
    for (int64_t h = head; h < head + heads; ++h)
      for (int64_t i = last - (last - first) / stride * stride; i <= last; i += stride) {
        rows_.push_back(static_cast<const char*>(p_.query) +
                        (t.batch * p_.query_stride[0] + h * p_.query_stride[1] +
                         i * p_.query_stride[2]) * element_bytes(p_.dtype));
        // far below every key stays far below in 32 bits
        const int64_t limit = p_.causal ? n - p_.Tq + i - p_.window : n - 1;
        limits_.push_back(static_cast<int32_t>(std::max<int64_t>(limit, -1)));
      }
    voters_.count = static_cast<int64_t>(rows_.size());
    voters_.lowest_limit = *std::min_element(limits_.begin(), limits_.end());
    limits_.resize(round_up(voters_.count, kHipLanes), limits_.back());
    voters_.row = rows_.data(), voters_.limit = limits_.data();
    kernel_.pack(p_, voters_, scratch_.get());
  }

  void score(const HipKeys& keys, const int32_t* tokens, int64_t n, float* scores) const {
    kernel_.score(p_, voters_, keys, tokens, n, scores, scratch_.get());
  }

 private:
  const HipParams& p_;
  const HipScoreKernel& kernel_;
  Buffer scratch_;
  std::vector<const char*> rows_;
  std::vector<int32_t> limits_;
  HipVoters voters_{};
};

// Writes the list of a task, n blocks, and zeros behind it.
inline void write_hip_row(const HipParams& p, const HipTask& t, const int32_t* blocks, int64_t n) {
  int32_t* to = p.indices + t.row(p) * p.K;
  std::copy(blocks, blocks + n, to);
  std::fill(to + n, to + p.K, 0);
  p.counts[t.row(p)] = static_cast<int32_t>(n);
}

}  // namespace sparse_attn
