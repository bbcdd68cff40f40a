// Which keys a tile of rows attends to, as runs of keys that are read tile by tile.
//
// Every key comes from one of three disjoint sources: the sink, the listed blocks without what sink
// and window hold, and the window. Runs 0 to 2 hold whole tiles that every row sees; what is left
// at the edges of the sources comes after them and is masked.
#pragma once
#include "device.cuh"

namespace sparse_attn {

enum class KeySource { sink, list, window };

// The positions of a tile's rows, and the list they share.
struct KeyQuestion {
  int first_position, last_position;
  int n_keys, sink, window, kv_block;
  bool causal;
  const int32_t* list;  // ascending block ids
  int listed;           // how many of them
  const int32_t* pages;  // of the sequence, of a paged call
};

// How many of `n` ascending ids are below `bound`; asked by a whole warp. A list out of order gives
// some number from 0 to n.
__device__ __forceinline__ int count_below(const int32_t* ids, int n, int bound) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = n;  // ids before `low` are below, ids from `high` on are not
  while (low < high) {
    const int part = (high - low + 31) / 32;
    const int last = low + (lane + 1) * part - 1;  // of the lane's part
    const bool below = last < high && __ldg(ids + last) < bound;
    low += __popc(__ballot_sync(0xffffffff, below)) * part;
    high = min(high, low + part - 1);
  }
  return low;
}

template <int kKeys>
struct KeyRuns {
  static constexpr int kRuns = 8;
  static constexpr int kMasked = 3;  // the first run with a mask

  int first[kRuns], stop[kRuns];  // keys, or for lists places in the listed tokens
  int tile[kRuns + 1];            // the first tile of each run, and how many there are

  __device__ static KeySource source(int run) {
    constexpr uint32_t kSources = 0b10'10'01'01'00'10'01'00;  // two bits each, from the right
    return static_cast<KeySource>(kSources >> 2 * run & 3);
  }

  __device__ int n_tiles() const { return tile[kRuns]; }
  __device__ int first_masked() const { return tile[kMasked]; }

  __device__ int run_of(int i) const {
    int run = 0;
    while (i >= tile[run + 1]) ++run;
    return run;
  }

  // In shared memory, by every thread of the block; ends with a barrier.
  __device__ void build(const KeyQuestion& q) {
    // keys below `whole` lie under the diagonal of every row, keys from `end` on of none
    const int whole = q.causal ? max(q.first_position + 1, 0) : q.n_keys;
    const int end = q.causal ? max(q.last_position + 1, 0) : q.n_keys;
    const int clear = q.window > 0 ? max(min(whole, q.first_position - q.window + 1), 0) : whole;
    const int bounds[4] = {q.sink / q.kv_block, (q.sink + q.kv_block - 1) / q.kv_block,
                           clear / q.kv_block, (end + q.kv_block - 1) / q.kv_block};
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i % warps != warp) continue;
      const int n = count_below(q.list, q.listed, bounds[i]);
      if (threadIdx.x % 32 == 0) first[i] = n;
    }
    __syncthreads();
    // list entries: [0, a) inside the sink, [a, b) partly, [b, c) whole, [c, d) partly
    const int d = first[3], b = min(first[1], d), a = min(first[0], b);
    const int c = min(max(first[2], b), d);
    __syncthreads();
    if (threadIdx.x == 0) write(q, whole, end, a, b, c, d);
    __syncthreads();
  }

  __device__ void write(const KeyQuestion& q, int whole, int end, int a, int b, int c,
                        int d) {
    const auto tiles = [](int from, int to) { return max(to - from, 0) / kKeys * kKeys; };
    const int sink_full = tiles(0, min(q.sink, whole));
    const int list_full = b * q.kv_block + tiles(b * q.kv_block, c * q.kv_block);
    const int low = max(max(q.first_position - q.window + 1, q.sink), 0);
    const int high = q.window > 0 ? q.last_position + 1 : 0;
    // the part of the window that is in the window of every row
    int inner = max(max(q.last_position - q.window + 1, q.sink), 0);
    const int inner_keys = q.window > 0 ? tiles(inner, q.first_position + 1) : 0;
    if (inner_keys == 0) inner = low;
    set(0, 0, sink_full);
    set(1, b * q.kv_block, list_full);
    set(2, inner, inner + inner_keys);
    set(3, sink_full, min(q.sink, end));
    set(4, a * q.kv_block, b * q.kv_block);
    set(5, list_full, d * q.kv_block);
    set(6, low, inner);
    set(7, inner + inner_keys, high);
    tile[0] = 0;
    for (int r = 0; r < kRuns; ++r)
      tile[r + 1] = tile[r] + (max(stop[r] - first[r], 0) + kKeys - 1) / kKeys;
  }

  __device__ void set(int run, int from, int to) { first[run] = from, stop[run] = to; }

  // The key in place `key` of tile `i`, or -1 where there is none: no list leads outside of the keys.
  __device__ int token(const KeyQuestion& q, int i, int key) const {
    const int run = run_of(i);
    const int place = first[run] + (i - tile[run]) * kKeys + key;
    if (place >= stop[run]) return -1;
    if (source(run) != KeySource::list) return place;
    const int64_t block = __ldg(q.list + place / q.kv_block);
    const int64_t token = block * q.kv_block + place % q.kv_block;
    return token >= q.sink && token < q.n_keys ? static_cast<int>(token) : -1;
  }
};

// What one row sees of a masked tile: tokens from `low` to `high`, or all others.
struct VisibleKeys {
  int low, high;
  bool others;

  __device__ static VisibleKeys of(const KeyQuestion& q, KeySource source, int position) {
    const int below_window = position - q.window;
    if (source == KeySource::window) return {below_window + 1, position, false};
    if (source == KeySource::sink) return {0, q.causal ? position : q.n_keys, false};
    if (q.causal) return {0, below_window, false};
    return {below_window + 1, position, true};
  }

  __device__ bool sees(int token) const {
    return token >= 0 && (token >= low && token <= high) != others;
  }
};

}  // namespace sparse_attn
