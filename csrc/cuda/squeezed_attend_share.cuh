// Which share of the work a block has. The keys of every tile of rows are dealt out in units, and
// the units of all tiles in equal shares, block after block: how many keys a head keeps is known
// on the device only, and differs.
#pragma once
#include "block_sparse_attention_rows.cuh"
#include "squeezed_attend_params.h"

namespace sparse_attn {

// The keys of a tile of rows: kept places of the context, `kept` of them, then the tail.
struct RunKeys {
  const int32_t *starts, *sums;  // of its list of runs
  int runs, kept;
  int tail;   // tokens of the tail up to the last query
  int shift;  // the place in the tail of query 0
  int n_tokens;

  template <int kKeys>
  __device__ int kept_tiles() const {
    return (kept + kKeys - 1) / kKeys;
  }
  template <int kKeys>
  __device__ int tiles() const {
    return kept_tiles<kKeys>() + (tail + kKeys - 1) / kKeys;
  }
  // At least one, so that every result is written.
  template <int kKeys>
  __device__ int units() const {
    constexpr int kTiles = kUnitKeys / kKeys;
    return max((tiles<kKeys>() + kTiles - 1) / kTiles, 1);
  }

  // How many runs end at or before a kept place, known to be `run` or one of the `span` - 1 next.
  __device__ int run_of(int place, int run, int span) const {
    if (run < runs && __ldg(sums + run) > place) return run;
    while (span > 1) {
      const int step = span / 2, at = run + step - 1;
      if (at < runs && __ldg(sums + at) <= place) run += step;
      span -= step;
    }
    return run;
  }

  // The token in place `key` of tile `i`, or -1 where there is none. `run` is where the caller's
  // last place was, at most kKeys places before; -1 at first. No run leads outside of the context.
  template <int kKeys>
  __device__ int token(int i, int key, int& run) const {
    const int first_tail = kept_tiles<kKeys>();
    if (i >= first_tail) {
      const int token = (i - first_tail) * kKeys + key;
      return token < tail ? token : -1;
    }
    const int place = i * kKeys + key;
    if (place >= kept) return -1;
    run = min(run < 0 ? run_of(place, 0, runs) : run_of(place, run, kKeys + 1), runs - 1);
    const int before = run > 0 ? __ldg(sums + run - 1) : 0;
    return min(max(__ldg(starts + run) + place - before, 0), n_tokens - 1);
  }
};

__device__ __forceinline__ void find_keys(RunKeys& keys, const SqueezedAttendCudaParams& p,
                                          int64_t item) {
  const auto& c = p.call;
  const int64_t list = item / p.query_tiles / p.head_tiles;
  const int query_tile = static_cast<int>(item % p.query_tiles);
  const int64_t batch = list / c.Hd, head = list % c.Hd;
  keys.starts = c.starts + batch * c.starts_stride[0] + head * c.starts_stride[1];
  keys.sums = c.sums + batch * c.sums_stride[0] + head * c.sums_stride[1];
  const int32_t count = c.counts[batch * c.counts_stride[0] + head * c.counts_stride[1]];
  keys.runs = min(max(count, 0), static_cast<int>(c.runs));
  keys.n_tokens = static_cast<int>(c.Tk);
  keys.kept = keys.runs == 0 ? 0 : min(max(keys.sums[keys.runs - 1], 0), keys.n_tokens);
  const int room = static_cast<int>(c.N);
  const int length = c.tail_lengths == nullptr ? room : min(max(c.tail_lengths[batch], 0), room);
  keys.shift = length - static_cast<int>(c.Tq);
  keys.tail = max(keys.shift + min((query_tile + 1) * p.queries, static_cast<int>(c.Tq)), 0);
}

__device__ __forceinline__ void find_rows(RowTile& rows, const SqueezedAttendCudaParams& p,
                                          int64_t item) {
  const auto& c = p.call;
  const int64_t list = item / p.query_tiles / p.head_tiles;
  const int head_tile = static_cast<int>(item / p.query_tiles % p.head_tiles);
  const int list_heads = static_cast<int>(c.Hq / c.Hd);
  rows.batch = list / c.Hd, rows.index = item;
  rows.first_head = static_cast<int>(list % c.Hd) * list_heads + head_tile * p.heads;
  rows.kv_head = rows.first_head / static_cast<int>(c.Hq / c.Hkv);
  rows.heads = min(p.heads, list_heads - head_tile * p.heads);
  rows.queries = p.queries;
  rows.first_query = static_cast<int>(item % p.query_tiles) * p.queries;
  rows.end_query = min(rows.first_query + p.queries, static_cast<int>(c.Tq));
}

// Block b of `blocks` takes units total * b / blocks to total * (b + 1) / blocks; no block that
// counts has none.
struct Share {
  int64_t total, blocks;
  int64_t unit, end;         // what the block has yet to do
  int64_t item, first_unit;  // the tile of rows that has `unit`, and where that begins

  __device__ int block_of(int64_t u) const {
    return static_cast<int>(((u + 1) * blocks + total - 1) / total - 1);
  }
};

// The sum of x over the threads of a block up to this one; `all` gets that of all threads.
// `partial` [kThreads / 32] is shared memory.
template <int kThreads>
__device__ __forceinline__ int64_t scan_block(int64_t x, int64_t* partial, int64_t& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffff, x, lanes);
    if (lane >= lanes) x += other;
  }
  __syncthreads();  // the call before may still read
  if (lane == 31) partial[warp] = x;
  __syncthreads();
  all = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i == warp) x += all;
    all += partial[i];
  }
  return x;
}

// In shared memory, by every thread of the block; ends with a barrier.
template <int kKeys, int kThreads>
__device__ __forceinline__ void find_share(Share& share, const SqueezedAttendCudaParams& p,
                                           int64_t* partial) {
  const auto units = [&](int64_t item) {
    if (item >= p.items) return 0;
    RunKeys keys;
    find_keys(keys, p, item);
    return keys.units<kKeys>();
  };
  int64_t mine = 0, total;
  for (int64_t item = threadIdx.x; item < p.items; item += kThreads) mine += units(item);
  scan_block<kThreads>(mine, partial, total);
  const int64_t blocks = min(int64_t{gridDim.x}, total), block = blockIdx.x;
  const int64_t begin = block < blocks ? total * block / blocks : total;
  if (threadIdx.x == 0) {
    share.total = total, share.blocks = blocks;
    share.unit = begin, share.end = block < blocks ? total * (block + 1) / blocks : total;
  }
  int64_t before = 0;
  for (int64_t first = 0; first < p.items && before <= begin; first += kThreads) {
    const int64_t item = first + threadIdx.x, n = units(item);
    int64_t all;
    const int64_t last = before + scan_block<kThreads>(n, partial, all);
    if (last - n <= begin && begin < last) share.item = item, share.first_unit = last - n;
    before += all;
  }
  __syncthreads();
}

}  // namespace sparse_attn
