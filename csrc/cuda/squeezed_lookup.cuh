// squeezed_lookup: sparse_attn/reference/squeezed_lookup.py says what.
//
// The scores (squeezed_lookup_scores.cuh) go to a block of threads per choice, which tests the
// clusters and lists what is kept as runs, in an order that no timing changes. Of two levels the
// coarse one goes first and marks which clusters of the fine one take part. Nothing is read by the
// host.
#pragma once
#include "squeezed_lookup_scores.cuh"

namespace sparse_attn {

// Whether a choice keeps a cluster.
struct ClusterTest {
  const float* log_counts;
  const uint8_t* alive;  // or null
  const float* scores;   // of the choice's first row, or part
  int64_t step;          // from one to the next
  int rows, parts;
  float bound, log_bound;
  const float* log_sums;  // of the rows

  __device__ bool operator()(int cluster) const {
    if (!(log_counts[cluster] > -kInfinity)) return false;
    if (alive != nullptr && alive[cluster] == 0) return false;
    if (bound <= 0) return true;  // scores are positive, but may underflow
    const float* const x = scores + cluster;
    // not at or below, so that it is kept where a side is NaN
    if (parts == 0 && rows == 1) {
      const float log_sum = log_sums[0];
      return !((fabsf(log_sum) < kInfinity ? x[0] - log_sum : kInfinity) <= log_bound);
    }
    float sum = 0;
    for (int i = 0; i < parts; ++i) sum += x[i * step];
    if (parts == 0)
      for (int i = 0; i < rows; ++i) sum += probability(x[i * step], log_sums[i]);
    return !(sum / static_cast<float>(rows) <= bound);
  }
};

// Where the clusters of a warp begin and what the warps before have kept.
struct KeptBefore {
  int runs, tokens;
  bool open;  // the last cluster that is not empty was kept
};

struct ChooseClustersShared {
  int runs[kChooseClustersThreads / 32], tokens[kChooseClustersThreads / 32];
  // 0: every cluster of the warp is empty, 1: the first or last that is not was dropped, 2: kept
  int first[kChooseClustersThreads / 32], last[kChooseClustersThreads / 32];
};
static_assert(sizeof(ChooseClustersShared) <= kChooseClustersBytes);

// 32 clusters of a warp: a bit each.
struct ClusterWord {
  uint32_t filled, kept;
  int begin, size;  // of the lane's

  __device__ ClusterWord(const int32_t* offsets, int cluster, int n, uint32_t kept_bits) {
    const bool exists = cluster < n;
    begin = exists ? offsets[cluster] : 0;
    size = exists ? offsets[cluster + 1] - begin : 0;
    filled = __ballot_sync(0xffffffff, size > 0);
    kept = kept_bits & filled;
  }

  // The lanes whose cluster begins a run, after a cluster that was kept or not.
  __device__ uint32_t firsts(bool open) const {
    const int lane = threadIdx.x % 32;
    const uint32_t before = filled & ((1u << lane) - 1);
    const bool follows = before == 0 ? open : (kept >> (31 - __clz(before)) & 1) != 0;
    return __ballot_sync(0xffffffff, (kept >> lane & 1) != 0 && !follows);
  }

  __device__ bool open_after(bool open) const {
    return filled == 0 ? open : (kept >> (31 - __clz(filled)) & 1) != 0;
  }
};

// The last parent whose clusters begin at or before one.
__device__ __forceinline__ int parent_of(const int32_t* children, int parents, int cluster) {
  int parent = 0;
  for (int span = parents; span > 1;) {
    const int step = span / 2;
    if (parent + step < parents && children[parent + step] <= cluster) parent += step;
    span -= step;
  }
  return parent;
}

// Lists the runs of a choice; bits [words] says which of n clusters are kept. Each warp has a share
// of the words, from `first_word` on.
__device__ __forceinline__ void list_runs(const SqueezedLookupParams& c, int64_t choice,
                                          const int32_t* offsets, const uint32_t* bits,
                                          int first_word, int end_word, ChooseClustersShared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = static_cast<int>(c.fine.K);
  constexpr int kWarps = kChooseClustersThreads / 32;
  int runs = 0, tokens = 0, first = 0, last = 0;
  for (int word = first_word; word < end_word; ++word) {
    const ClusterWord w(offsets, word * 32 + lane, n, bits[word]);
    runs += __popc(w.firsts(last == 2));
    if (w.kept >> lane & 1) tokens += w.size;
    if (w.filled == 0) continue;
    if (first == 0) first = (w.kept >> (__ffs(w.filled) - 1) & 1) != 0 ? 2 : 1;
    last = w.open_after(false) ? 2 : 1;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) tokens += __shfl_xor_sync(0xffffffff, tokens, lanes);
  if (lane == 0)
    s.runs[warp] = runs, s.tokens[warp] = tokens, s.first[warp] = first, s.last[warp] = last;
  __syncthreads();
  KeptBefore before{0, 0, false}, all{0, 0, false};
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before = all;
    all.runs += s.runs[i] - (all.open && s.first[i] == 2), all.tokens += s.tokens[i];
    if (s.last[i] != 0) all.open = s.last[i] == 2;
  }
  int32_t* const starts = c.starts + choice * c.runs;
  int32_t* const sums = c.sums + choice * c.runs;
  for (int word = first_word; word < end_word; ++word) {
    const ClusterWord w(offsets, word * 32 + lane, n, bits[word]);
    const uint32_t firsts = w.firsts(before.open);
    const int size = w.kept >> lane & 1 ? w.size : 0;
    int sum = size;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(0xffffffff, sum, lanes);
      if (lane >= lanes) sum += other;
    }
    if (firsts >> lane & 1) {
      const int place = before.runs + __popc(firsts & ((1u << lane) - 1));
      starts[place] = w.begin;
      if (place > 0) sums[place - 1] = before.tokens + sum - size;
    }
    before.runs += __popc(firsts), before.tokens += __shfl_sync(0xffffffff, sum, 31);
    before.open = w.open_after(before.open);
  }
  for (int i = all.runs + static_cast<int>(threadIdx.x); i < c.runs; i += kChooseClustersThreads)
    starts[i] = 0, sums[i] = 0;
  if (threadIdx.x != 0) return;
  if (all.runs > 0) sums[all.runs - 1] = all.tokens;
  c.counts[choice] = all.runs, c.tokens[choice] = all.tokens;
}

// One choice: tests its clusters, then lists the runs, or marks the children of what is kept.
__global__ void __launch_bounds__(kChooseClustersThreads)
    choose_clusters_kernel(const __grid_constant__ SqueezedLookupCudaParams p) {
  SA_SHARED_MEMORY(memory);
  auto& s = *reinterpret_cast<ChooseClustersShared*>(memory);
  auto* const log_sums = reinterpret_cast<float*>(memory + kChooseClustersBytes);  // [rows]
  const auto& c = p.call;
  const SqueezedLevel& level = level_of(p);
  const SqueezedLookupScratch& scratch = scratch_of(p);
  const int64_t choice = blockIdx.x, batch = choice / c.Hd;
  const int64_t kv_head = choice % c.Hd / (c.Hd / c.Hkv);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kWarps = kChooseClustersThreads / 32;
  if (p.parts == 0)
    for (int row = warp; row < p.rows; row += kWarps) {
      const float* const from = scratch.extent + (choice * p.rows + row) * scratch.splits * 2;
      Extent all;
      for (int i = lane; i < scratch.splits; i += 32) all.join({from[2 * i], from[2 * i + 1]});
      for (int lanes = 16; lanes > 0; lanes /= 2) all.join_lanes(lanes);
      if (lane == 0) log_sums[row] = all.log_sum();
    }
  __syncthreads();
  const float bound = *level.threshold;
  const ClusterTest keeps{
      level.log_counts + batch * level.log_counts_stride[0] + kv_head * level.log_counts_stride[1],
      alive_of(p, choice),
      scratch.scores + choice * (p.parts == 0 ? p.rows : p.parts) * scratch.row,
      scratch.row, p.rows, p.parts, bound, log2f(bound), log_sums};
  const int n = static_cast<int>(level.K), words = (n + 31) / 32;
  const int first_word = static_cast<int>(int64_t{words} * warp / kWarps);
  const int end_word = static_cast<int>(int64_t{words} * (warp + 1) / kWarps);
  uint32_t* const bits = scratch.kept + choice * words;
  for (int word = first_word; word < end_word; ++word) {
    const int cluster = word * 32 + lane;
    const uint32_t kept = __ballot_sync(0xffffffff, cluster < n && keeps(cluster));
    if (lane == 0) bits[word] = kept;
  }
  __syncthreads();
  const int32_t* const offsets =
      level.offsets + batch * level.offsets_stride[0] + kv_head * level.offsets_stride[1];
  if (!p.at_coarse) return list_runs(c, choice, offsets, bits, first_word, end_word, s);
  for (int cluster = threadIdx.x; cluster < c.fine.K; cluster += kChooseClustersThreads) {
    const int parent = parent_of(offsets, n, cluster);
    p.alive[choice * c.fine.K + cluster] = bits[parent / 32] >> parent % 32 & 1;
  }
}

}  // namespace sparse_attn
