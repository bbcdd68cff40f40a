// hip_prune_select: sparse_attn/reference/hip_prune_select.py says what.
//
// A block of threads runs all stages of one block of queries. Candidates come in batches, in
// ascending order, behind those kept so far; when a batch is scored the best stay, by radix select.
// So a stage needs room for a few times what it keeps, however many chunks there are. Nothing but
// the result is written.
#pragma once
#include "hip_keys.cuh"

namespace sparse_attn {

struct HipPruneShared {
  int *parents, *candidates, *scores;
  int* limits;
  TopKShared* top;
  unsigned char *rows, *rings;

  __device__ __forceinline__ HipPruneShared(unsigned char* memory, const HipPruneCudaParams& p,
                                            int row_bytes) {
    const int n_rows = static_cast<int>(p.rows), room = static_cast<int>(p.room);
    rows = memory, rings = rows + n_rows * row_bytes;
    const int warps = blockDim.x / 32;
    limits = reinterpret_cast<int*>(rings + warps * kHipTiles * kHipTileKeys * row_bytes);
    top = reinterpret_cast<TopKShared*>(limits + n_rows);
    candidates = reinterpret_cast<int*>(top + 1);
    scores = candidates + room, parents = scores + room;
  }
};

// The keys that may be chosen, and one stage's chunks of them.
struct Chunks {
  int64_t begin, end;
  int size;

  __device__ __forceinline__ bool exists(int64_t chunk) const {
    return (chunk + 1) * size > begin && chunk * size < end;
  }
  __device__ __forceinline__ int first(int chunk) const {
    return static_cast<int>(max(int64_t{chunk} * size, begin));
  }
  __device__ __forceinline__ int last(int chunk) const {  // exclusive
    return static_cast<int>(min((int64_t{chunk} + 1) * size, end));
  }
};

// Eight chunks on their way down: of chunk lane / 4 the keys [first, last) that are left.
struct Descent {
  int group, first, last;
  float score;
};

// Scores n chunks of more than kHipScanned keys by binary descent. A tile holds the representatives
// of eight left halves and below them those of the right halves; each stage of a warp's ring holds
// a tile of its own descent, so that copies and products of different chunks overlap.
template <class T, int kDim>
__device__ __forceinline__ void descend(const KeyRows<T>& keys, const QueryRows<T, kDim>& query,
                                        int D, bool centre, const Chunks& chunks,
                                        unsigned char* rings, const int* candidates, int* scores,
                                        int n) {
  const KeyRing<kDim> ring(rings);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = (n + 7) / 8, levels = 32 - __clz(chunks.size - 1);
  Descent x[kHipTiles];
  const auto begin = [&](Descent& d, int group) {
    d.group = group, d.score = -kInfinity;
    const int i = group * 8 + lane / 4;
    const bool valid = i < n && candidates[min(i, n - 1)] >= 0;
    d.first = valid ? chunks.first(candidates[i]) : 0;
    d.last = valid ? chunks.last(candidates[i]) : 0;
  };
  const auto middle = [&](const Descent& d) { return d.first + (d.last - d.first) / 2; };
  const auto left = [&](const Descent& d) {
    return centre ? d.first + (middle(d) - d.first) / 2 : d.first;
  };
  const auto right = [&](const Descent& d) {
    return centre ? middle(d) + (d.last - middle(d)) / 2 : middle(d);
  };
  const auto fetch = [&](const Descent& d, int stage) {
    if (d.group < groups) {
      const int of_left = d.last == 0 ? -1 : left(d), of_right = d.last == 0 ? -1 : right(d);
      const int from = lane % 8 * 4;
      const int a = __shfl_sync(kAllLanes, of_left, from);
      const int b = __shfl_sync(kAllLanes, of_right, from);
      copy_keys(ring.stage(stage), keys, lane / 8 % 2 == 0 ? a : b, D);
    }
    cp_async_commit();
  };
  int first_group = warp * kHipTiles;
#pragma unroll
  for (int s = 0; s < kHipTiles; ++s) begin(x[s], first_group + s), fetch(x[s], s);
  for (; first_group < groups; first_group += warps * kHipTiles)
    for (int level = 0; level < levels; ++level)
#pragma unroll
      for (int s = 0; s < kHipTiles; ++s) {
        Descent& d = x[s];
        cp_async_wait<kHipTiles - 1>();
        __syncwarp();
        if (d.group < groups) {
          const int token[2] = {left(d), right(d)};
          const bool masked = __any_sync(kAllLanes, d.last - 1 > query.limit);
          float best[2];
          score_tile(ring.stage(s), query, masked, token, best);
          d.score = fmaxf(d.score, fmaxf(best[0], best[1]));
          if (d.last - d.first > 1) (best[1] > best[0] ? d.first : d.last) = middle(d);
          if (level == levels - 1) {
            const int i = d.group * 8 + lane / 4;
            if (lane % 4 == 0 && i < n && d.last > 0) atomicMax(&scores[i], ordered(d.score));
            begin(d, d.group + warps * kHipTiles);
          }
        }
        __syncwarp();  // the stage has been read
        fetch(d, s);
      }
  cp_async_wait<0>();
}

// Scores candidates [0, n) of a batch for the heads of a list.
template <class T, int kDim>
__device__ __forceinline__ void score_chunks(const HipPruneCudaParams& p, const Chunks& chunks,
                                             const SampledRows& sampled,
                                             QueryRows<T, kDim>& query, int64_t batch,
                                             int64_t first_head, const HipPruneShared& s,
                                             const int* candidates, int* scores, int n) {
  const int group = static_cast<int>(p.Hq / p.Hkv), D = static_cast<int>(p.D);
  const int heads = static_cast<int>(p.Hq / p.H);
  const bool scan = chunks.size <= kHipScanned;
  // heads that share keys are rows of one tile where all look at the same keys
  const int together = scan ? min(group, heads) : 1;
  for (int64_t head = first_head; head < first_head + heads; head += together) {
    const KeyRows<T> keys(p, batch, head / group);
    for (int row = 0; row < together * sampled.n; row += static_cast<int>(p.rows)) {
      __syncthreads();
      query.load(p, batch, head, together, sampled, row);
      if (!scan) {
        descend(keys, query, D, p.centre, chunks, s.rings, candidates, scores, n);
        continue;
      }
      const int size = chunks.size;
      const auto token_of = [&](int i) {
        const int chunk = candidates[i / size];
        if (chunk < 0) return -1;
        const int token = chunks.first(chunk) + i % size;
        return token < chunks.last(chunk) ? token : chunks.first(chunk);
      };
      const auto bound_of = [&](int i) {
        const int chunk = candidates[i / size];
        return chunk < 0 ? static_cast<int>(chunks.end) : chunks.last(chunk) - 1;
      };
      score_tokens(keys, query, D, s.rings, n * size, token_of, bound_of,
                   [&](int i, float score) {
                     if (candidates[i / size] >= 0)
                       atomicMax(&scores[i / size], ordered(score));
                   });
    }
  }
  __syncthreads();
}

// One stage: from n_parents chunks, or all from chunk `first_chunk` on, to at most `keep`, which it
// leaves in s.candidates. Returns their number.
template <class T, int kDim>
__device__ __forceinline__ int prune_stage(const HipPruneCudaParams& p, const Chunks& chunks,
                                           int keep, int split, int64_t first_chunk,
                                           int64_t n_parents, const SampledRows& sampled,
                                           QueryRows<T, kDim>& query, int64_t batch,
                                           int64_t first_head, const HipPruneShared& s) {
  const int64_t total = n_parents * split;
  int held = 0;
  for (int64_t done = 0; done < total;) {
    const int batch_size = static_cast<int>(min(p.room - held, total - done));
    const int n = held + batch_size;
    for (int i = held + threadIdx.x; i < n; i += blockDim.x) {
      const int64_t of_all = done + i - held;
      const int64_t chunk = first_chunk >= 0
                                ? first_chunk + of_all
                                : s.parents[of_all / split] * int64_t{split} + of_all % split;
      const bool exists = chunks.exists(chunk);
      s.candidates[i] = exists ? static_cast<int>(chunk) : -1;
      s.scores[i] = exists ? ordered(-kInfinity) : kNoCandidate;
    }
    __syncthreads();
    if (total > keep)
      score_chunks(p, chunks, sampled, query, batch, first_head, s, s.candidates + held,
                   s.scores + held, batch_size);
    const TopK top = find_top(s.scores, n, keep, *s.top);
    held = compact(s.scores, n, top, *s.top, [&](int i) { return s.candidates[i]; },
                   [&](int place, int chunk, int score) {
                     s.candidates[place] = chunk, s.scores[place] = score;
                   });
    done += batch_size;
    __syncthreads();
  }
  return held;
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kHipMostWarps, 1)
    hip_prune_select_kernel(const __grid_constant__ HipPruneCudaParams p) {
  SA_SHARED_MEMORY(memory);
  const HipPruneShared s(memory, p, SharedTile<kDim>::kRowBytes);
  // lists that share keys run side by side, for the sake of the second-level cache
  const int64_t side = max(p.H / p.Hkv, int64_t{1}), others = p.H / side;
  const int64_t block = blockIdx.x / side % p.Mq, rest = blockIdx.x / side / p.Mq;
  const int64_t batch = rest / others;
  const int64_t list = rest % others * side + blockIdx.x % side;
  const int n_keys = KeyRows<T>(p, batch, 0).n;
  const int smallest = static_cast<int>(p.chunk[p.stages - 1]);
  Chunks chunks{p.sink / smallest * smallest, SampledRows(p, block, 1, n_keys).limit + int64_t{1},
                static_cast<int>(p.chunk[0])};
  QueryRows<T, kDim> query(p, s.rows, s.limits, p.rows);
  int count = 0;
  for (int stage = 0; stage < p.stages && chunks.begin < chunks.end; ++stage) {
    int64_t first_chunk = -1, n_parents = count;
    int split = 1;
    chunks.size = static_cast<int>(p.chunk[stage]);
    if (stage == 0) {
      first_chunk = chunks.begin / chunks.size;
      n_parents = (chunks.end - 1) / chunks.size - first_chunk + 1;
    } else {
      split = static_cast<int>(p.chunk[stage - 1]) / chunks.size;
      for (int i = threadIdx.x; i < count; i += blockDim.x) s.parents[i] = s.candidates[i];
      __syncthreads();
    }
    const SampledRows sampled(p, block, p.q_stride[stage], n_keys);
    count = prune_stage(p, chunks, static_cast<int>(p.keep[stage]), split, first_chunk, n_parents,
                        sampled, query, batch, list * (p.Hq / p.H), s);
  }
  const int64_t out = (batch * p.H + list) * p.Mq + block;
  int32_t* const indices = p.indices + out * p.K;
  for (int i = threadIdx.x; i < count; i += blockDim.x) indices[i] = s.candidates[i];
  for (int i = count + threadIdx.x; i < p.K; i += blockDim.x) indices[i] = 0;
  if (threadIdx.x == 0) p.counts[out] = count;
}

}  // namespace sparse_attn
