// flex_prefill_select, variant "exact": sparse_attn/reference/flex_prefill_select.py says what.
//
// The probe's sums per key and distance (flex_prefill_select_probe.cuh) become sums per block; a
// block of threads per head chooses among them by thresholds; a block of threads per row of blocks
// lists what the row keeps. Heads that choose per row score all pairs of blocks first, in the
// memory of the result. Nothing is read by the host.
#pragma once
#include "flex_prefill_select_probe.cuh"
#include "flex_prefill_select_threshold.cuh"

namespace sparse_attn {

enum BlockFlag : int { kColumn = 1, kBucket = 2, kAtProbe = 4 };

// mean [D] = mean of rows [0, n) of x, in a fixed order; `partial` [kMeanThreads * 8] is shared.
template <class T>
__device__ __forceinline__ void mean_of_tokens(const T* x, int64_t stride, int n, int D,
                                               float* partial, float* mean) {
  const int pieces = D / 8, lanes = kMeanThreads / pieces;  // tokens at once
  const int piece = threadIdx.x % pieces, lane = threadIdx.x / pieces;
  if (lane < lanes) {
    float sum[8] = {};
    for (int i = lane; i < n; i += lanes) {
      const auto part = *reinterpret_cast<const Pack<T, 8>*>(x + i * stride + piece * 8);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += to_float(part[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) partial[lane * D + piece * 8 + e] = sum[e];
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += kMeanThreads) {
    float sum = 0;
    for (int i = 0; i < lanes; ++i) sum += partial[i * D + d];
    mean[d] = sum / static_cast<float>(n);
  }
}

template <class T>
__device__ __forceinline__ const T* query_head(const FlexPrefillCudaParams& p, int64_t head) {
  return static_cast<const T*>(p.query) + head / p.Hq * p.query_stride[0] +
         head % p.Hq * p.query_stride[1];
}

// A head's row of keys in [B * Hkv].
__device__ __forceinline__ int64_t key_head(const FlexPrefillCudaParams& p, int64_t head) {
  return head / p.Hq * p.Hkv + head % p.Hq / (p.Hq / p.Hkv);
}

// Means of the blocks of keys, or of the blocks of queries of query-aware heads.
template <class T, bool kOfQuery>
__global__ void __launch_bounds__(kMeanThreads)
    block_mean_kernel(const __grid_constant__ FlexPrefillCudaParams p) {
  SA_SHARED_MEMORY(memory);
  const int64_t blocks = kOfQuery ? p.Mq : p.Nk, tokens = kOfQuery ? p.Tq : p.Tk;
  const int64_t head = blockIdx.x / blocks, begin = blockIdx.x % blocks * p.block;
  if (kOfQuery && p.state[head] != kQueryAware) return;
  const int64_t(&stride)[3] = kOfQuery ? p.query_stride : p.key_stride;
  const T* const x =
      kOfQuery ? query_head<T>(p, head)
               : static_cast<const T*>(p.key) + head / p.Hkv * stride[0] + head % p.Hkv * stride[1];
  mean_of_tokens(x + begin * stride[2], stride[2], static_cast<int>(min(p.block, tokens - begin)),
                 static_cast<int>(p.D), reinterpret_cast<float*>(memory),
                 (kOfQuery ? p.mean_query : p.mean_key) + int64_t{blockIdx.x} * p.D);
}

__device__ __forceinline__ float sum_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  return x;
}

// The probe's sums per block, and the score of its mean against the mean of each block.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    block_sum_kernel(const __grid_constant__ FlexPrefillCudaParams p) {
  SA_SHARED_MEMORY(memory);
  const int64_t parts = (p.Nk + kSumBlocks - 1) / kSumBlocks;
  const int64_t head = blockIdx.x / parts, first = blockIdx.x % parts * kSumBlocks;
  if (p.finite[head] == 0) return;
  float* const mean = reinterpret_cast<float*>(memory);  // [D], then scratch
  const int D = static_cast<int>(p.D), lane = threadIdx.x % 32;
  mean_of_tokens(query_head<T>(p, head) + (p.Tq - p.probe) * p.query_stride[2], p.query_stride[2],
                 static_cast<int>(p.probe), D, mean + D, mean);
  __syncthreads();
  const int64_t end = min(first + kSumBlocks, p.Nk);
  for (int64_t c = first + threadIdx.x / 32; c < end; c += kSumThreads / 32) {
    const int n_keys = static_cast<int>(p.Tk), begin = static_cast<int>(c * p.block);
    const int size = min(static_cast<int>(p.block), n_keys - begin);
    float mass = 0, column = 0, bucket = 0, score = 0;
    for (int i = lane; i < size; i += 32) {
      mass += p.vertical[head * p.Tk + begin + i];
      column += p.columns[head * p.Tk + begin + i];
      bucket += sum_at(p, p.diagonals, p.diagonal_spill, head, n_keys - 1 - begin - i);
    }
    const float* const mean_key = p.mean_key + (key_head(p, head) * p.Nk + c) * D;
    for (int d = lane; d < D; d += 32) score += mean[d] * mean_key[d];
    mass = sum_warp(mass), column = sum_warp(column), bucket = sum_warp(bucket);
    score = sum_warp(score);
    if (lane != 0) continue;
    p.mass[head * p.Nk + c] = mass;
    p.ranked[head * 2 * p.Nk + c] = column, p.ranked[(head * 2 + 1) * p.Nk + c] = bucket;
    p.estimate[head * p.Nk + c] = score * p.scale + logf(static_cast<float>(size));
  }
}

// The softmax of n scores: exp(x - top) / sum.
template <int kThreads>
__device__ __forceinline__ void softmax_extent(const float* x, int n, float* partial, float& top,
                                               float& sum) {
  top = -kInfinity, sum = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) top = fmaxf(top, x[i]);
  top = max_block<kThreads>(top, partial);
  for (int i = threadIdx.x; i < n; i += kThreads) sum += expf(x[i] - top);
  sum = sum_block<kThreads>(sum, partial);
}

// Square root of the Jensen-Shannon divergence of softmax(scores) and mass, natural log.
template <int kThreads>
__device__ __forceinline__ float divergence(const float* scores, const float* mass, int n,
                                            float* partial) {
  const auto term = [](float x, float mean) { return x > 0 ? x * logf(x / mean) : 0 * x; };
  float top, total, sum = 0;
  softmax_extent<kThreads>(scores, n, partial, top, total);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float a = expf(scores[i] - top) / total, b = mass[i], mean = fmaxf((a + b) / 2, 1e-37f);
    sum += term(a, mean) + term(b, mean);
  }
  sum = sum_block<kThreads>(sum, partial);
  return sqrtf(sum < 0 ? 0.f : sum / 2);  // NaN stays: it is below no tau
}

struct ChooseShared {
  ThresholdShared threshold;
  float partial[kChooseThreads / 32];
  int counts[kChooseThreads / 32];
};
static_assert(sizeof(ChooseShared) == kChooseSharedBytes);

// How many of n values lie above `least`, and how many have just these bits, up to `equal`, which
// is lessened by them.
__device__ __forceinline__ int count_taken(const float* x, int n, uint32_t least, int& equal) {
  int above = 0, same = 0;
  for (int begin = 0; begin < n; begin += kChooseThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    const uint32_t bits = i < n ? __float_as_uint(x[i]) : 0;
    above += __syncthreads_count(i < n && bits > least);
    same += __syncthreads_count(i < n && bits == least);
  }
  same = min(same, equal);
  equal -= same;
  return above + same;
}

// Per head: which columns and buckets of distances to keep, and whether to choose per row.
__global__ void __launch_bounds__(kChooseThreads)
    choose_kernel(const __grid_constant__ FlexPrefillCudaParams p) {
  SA_SHARED_MEMORY(memory);
  auto& s = *reinterpret_cast<ChooseShared*>(memory);
  constexpr int kThreads = kChooseThreads;
  const int64_t head = blockIdx.x;
  const int n = static_cast<int>(p.Nk), tid = threadIdx.x;
  const float* const mass = p.mass + head * n;
  const float* const columns = p.ranked + head * 2 * n;
  const float* const buckets = columns + n;
  if (p.finite[head] == 0) {
    if (tid == 0) p.pattern[head] = 0, p.state[head] = kEveryBlock;
    return;
  }
  const bool aware = divergence<kThreads>(p.estimate + head * n, mass, n, s.partial) < p.tau;
  int n_columns = 0, n_buckets = 0;
  if (!aware) {
    float paid = 0;
    for (int i = tid; i < 2 * n; i += kThreads) paid += columns[i];
    paid = sum_block<kThreads>(paid, s.partial);
    // the rest of the mass lies in blocks that are kept anyway
    const auto all = find_threshold<kThreads, false>(columns, 2 * n,
                                                     fixed_point(p.gamma - 1 + paid), s.threshold);
    int equal = all.equal;
    n_columns = count_taken(columns, n, all.bits, equal);
    n_buckets = count_taken(buckets, n, all.bits, equal);
  }
  const auto bounded = [&](int count) {
    return min(min(max(int64_t{count}, p.low), p.high), p.Nk);
  };
  const auto column = find_threshold<kThreads, true>(columns, n, bounded(n_columns), s.threshold);
  const auto bucket = find_threshold<kThreads, true>(buckets, n, bounded(n_buckets), s.threshold);
  // the estimate promises nothing: where the truth is known, the probe rows, keep that too
  const auto at_probe = find_threshold<kThreads, false>(
      mass, n, aware ? fixed_point(p.gamma) : 0, s.threshold);
  int columns_seen = 0, buckets_seen = 0, masses_seen = 0;
  for (int begin = 0; begin < n; begin += kThreads) {
    const int i = begin + tid;
    const bool exists = i < n;
    int flag = takes<kThreads>(column, exists ? columns[i] : -1, columns_seen, s.counts) * kColumn;
    flag += takes<kThreads>(bucket, exists ? buckets[i] : -1, buckets_seen, s.counts) * kBucket;
    flag += takes<kThreads>(at_probe, exists ? mass[i] : -1, masses_seen, s.counts) * kAtProbe;
    if (exists) p.flags[head * n + i] = static_cast<uint8_t>(flag);
  }
  if (tid == 0) p.pattern[head] = aware, p.state[head] = aware ? kQueryAware : kVerticalSlash;
}

// Positions of a row of blocks, which need not line up with the blocks of keys.
struct BlockRow {
  int64_t first, last;  // of its queries
  int visible;          // blocks with a key at or before the last

  __device__ __forceinline__ BlockRow(const FlexPrefillCudaParams& p, int64_t row) {
    first = p.Tk - p.Tq + row * p.block;
    last = min(first + p.block, p.Tk) - 1;
    visible = last < 0 ? 0 : static_cast<int>(last / p.block) + 1;
  }
};

// Scores of the means of kScoreRows blocks of queries against those of kScoreColumns blocks of
// keys, for query-aware heads.
__global__ void __launch_bounds__(kScoreThreads)
    block_score_kernel(const __grid_constant__ FlexPrefillCudaParams p) {
  SA_SHARED_MEMORY(memory);
  const int64_t row_parts = (p.Mq + kScoreRows - 1) / kScoreRows;
  const int64_t column_parts = (p.Nk + kScoreColumns - 1) / kScoreColumns;
  const int64_t head = blockIdx.x / column_parts / row_parts;
  const int64_t row = blockIdx.x / column_parts % row_parts * kScoreRows;
  const int64_t column = blockIdx.x % column_parts * kScoreColumns;
  if (p.state[head] != kQueryAware) return;
  const int rows = static_cast<int>(min(p.Mq - row, int64_t{kScoreRows}));
  const int columns = static_cast<int>(min(p.Nk - column, int64_t{kScoreColumns}));
  if (column >= BlockRow(p, row + rows - 1).visible) return;
  auto& a = *reinterpret_cast<float(*)[kScoreDims][kScoreRows + 1]>(memory);
  auto& b = *reinterpret_cast<float(*)[kScoreDims][kScoreColumns + 1]>(memory + sizeof(a));
  const float* const query = p.mean_query + (head * p.Mq + row) * p.D;
  const float* const key = p.mean_key + (key_head(p, head) * p.Nk + column) * p.D;
  const int tid = threadIdx.x, y = tid / 16 * 4, x = tid % 16;  // rows y .. y + 3, columns x + 16 j
  float sum[4][4] = {};
  for (int begin = 0; begin < p.D; begin += kScoreDims) {
    const int d = begin + tid % kScoreDims;
    __syncthreads();
    for (int i = tid / kScoreDims; i < kScoreRows; i += kScoreThreads / kScoreDims)
      a[tid % kScoreDims][i] = i < rows && d < p.D ? query[i * p.D + d] : 0.f;
    for (int i = tid / kScoreDims; i < kScoreColumns; i += kScoreThreads / kScoreDims)
      b[tid % kScoreDims][i] = i < columns && d < p.D ? key[i * p.D + d] : 0.f;
    __syncthreads();
    for (int k = 0; k < kScoreDims; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a[k][y + i] * b[k][x + 16 * j];
  }
  float* const scores = reinterpret_cast<float*>(p.indices) + (head * p.Mq + row) * p.Nk + column;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = x + 16 * j;
      if (y + i >= rows || c >= columns) continue;
      const int64_t size = min(p.block, p.Tk - (column + c) * p.block);
      scores[(y + i) * p.Nk + c] = sum[i][j] * p.scale + logf(static_cast<float>(size));
    }
}

// Whether a row keeps visible block c by its head's choice: sink, own, columns and buckets.
__device__ __forceinline__ bool is_kept(const FlexPrefillCudaParams& p, const uint8_t* flags,
                                        const BlockRow& row, int64_t c) {
  const int64_t begin = c * p.block;
  if (c == 0 || row.first < begin + p.block || flags[c] & kColumn) return true;
  // distances of the row's queries to the block's keys lie in up to three buckets
  const int64_t near = (row.first - begin - p.block + 1) / p.block;
  const int64_t far = (row.last - begin) / p.block;
  for (int64_t bucket = near; bucket <= far; ++bucket)
    if (flags[bucket] & kBucket) return true;
  return false;
}

struct ListShared {
  ThresholdShared threshold;
  float partial[kListThreads / 32];
  int counts[kListThreads / 32];
};
static_assert(sizeof(ListShared) == kListSharedBytes);

// Turns a row's scores into softmax weights, -1 where the block is kept already. Returns the
// threshold that brings the row to gamma; false where a score is not finite.
__device__ __forceinline__ bool weigh_row(const FlexPrefillCudaParams& p, float* scores,
                                          const uint8_t* flags, const BlockRow& row, ListShared& s,
                                          Threshold& threshold) {
  float top, total, held = 0;
  softmax_extent<kListThreads>(scores, row.visible, s.partial, top, total);
  for (int c = threadIdx.x; c < row.visible; c += kListThreads) {
    const float weight = expf(scores[c] - top) / total;
    const bool kept = is_kept(p, flags, row, c);
    if (kept) held += weight;
    scores[c] = kept ? -1.f : weight;
  }
  held = sum_block<kListThreads>(held, s.partial) + 0 * total;
  if (!(held < kInfinity)) return false;
  threshold = find_threshold<kListThreads, false>(scores, row.visible, fixed_point(p.gamma - held),
                                                  s.threshold);
  // a row whose weights do not reach gamma takes all that are not 0
  if (threshold.bits == 0) threshold.equal = 0;
  return true;
}

// Lists what a row of blocks keeps.
__global__ void __launch_bounds__(kListThreads)
    list_kernel(const __grid_constant__ FlexPrefillCudaParams p) {
  SA_SHARED_MEMORY(memory);
  auto& s = *reinterpret_cast<ListShared*>(memory);
  const int64_t head = blockIdx.x / p.Mq, i_row = blockIdx.x % p.Mq;
  const BlockRow row(p, i_row);
  const uint8_t* const flags = p.flags + head * p.Nk;
  int32_t* const indices = p.indices + int64_t{blockIdx.x} * p.Nk;
  float* const weights = reinterpret_cast<float*>(indices);
  const bool all_heads = p.gamma >= 1;
  if (all_heads && i_row == 0 && threadIdx.x == 0) p.pattern[head] = 0;
  int state = all_heads ? kEveryBlock : p.state[head];
  Threshold threshold{0xffffffff, 0};
  if (state == kQueryAware && !weigh_row(p, weights, flags, row, s, threshold)) state = kEveryBlock;
  const bool at_probe = i_row >= (p.Tq - p.probe) / p.block;
  int count = 0, seen = 0;
  for (int begin = 0; begin < row.visible; begin += kListThreads) {
    const int c = begin + static_cast<int>(threadIdx.x);
    const bool visible = c < row.visible;
    bool keep = visible && (state == kEveryBlock || is_kept(p, flags, row, c));
    if (state == kQueryAware) {
      keep |= takes<kListThreads>(threshold, visible ? weights[c] : -1, seen, s.counts);
      keep |= visible && at_probe && flags[c] & kAtProbe;
    }
    // past its barriers every weight of this round has been read
    int total;
    const int place = count + rank_in_block<kListThreads>(keep, s.counts, total);
    if (keep) indices[place] = c;
    count += total;
  }
  for (int c = count + static_cast<int>(threadIdx.x); c < p.Nk; c += kListThreads) indices[c] = 0;
  if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}

}  // namespace sparse_attn
