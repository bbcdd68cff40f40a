// The probe of flex_prefill_select: attention of the last queries, per key and per distance.
//
// Three kernels walk over the keys and compute the same scores anew, which is cheaper than storing
// them. A block of threads takes one head and one chunk of keys, in tiles of 128 rows x 64 keys;
// the rows are the last queries, padded in front. Nothing is added by atomics.
#pragma once
#include "flex_prefill_select_params.h"
#include "sm80.cuh"

namespace sparse_attn {

constexpr uint32_t kFullWarp = 0xffffffff;
constexpr int kSegments = 96;  // places of distances that a warp's 64 x 32 tile touches

// What a block of threads works at: head, chunk and the tiles of keys [begin, end).
struct ProbeTask {
  int64_t head, kv_head, batch;
  int chunk, begin, end;

  // heads that share keys run side by side, for the sake of the second-level cache
  __device__ __forceinline__ explicit ProbeTask(const FlexPrefillCudaParams& p) {
    const int group = static_cast<int>(p.Hq / p.Hkv), chunks = static_cast<int>(p.chunks);
    const int in_group = blockIdx.x % group;
    chunk = blockIdx.x / group % chunks;
    const int kv = blockIdx.x / group / chunks;  // of B * Hkv
    batch = kv / p.Hkv, kv_head = kv % p.Hkv;
    head = int64_t{kv} * group + in_group;
    begin = chunk * static_cast<int>(p.chunk_tiles);
    end = min(begin + static_cast<int>(p.chunk_tiles),
              static_cast<int>((p.Tk + kTileKeys - 1) / kTileKeys));
  }
};

// Rows of one slice, 128 bytes each: their eight pieces are permuted so that neither copies nor
// ldmatrix meet a bank twice.
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kSliceDims + (piece ^ (row & 7)) * 8;
}

// Copies rows [first, first + rows) of x [n, D] to `slice`; zeros for rows outside of [0, n).
template <class T>
__device__ __forceinline__ void copy_slice(T* to, const T* x, int64_t stride, int64_t first,
                                           int rows, int64_t n, int slice, int D) {
  for (int i = threadIdx.x; i < rows * 8; i += kProbeThreads) {
    const int row = i / 8, piece = i % 8, d = slice * kSliceDims + piece * 8;
    const bool valid = first + row >= 0 && first + row < n && d < D;
    cp_async_16(to + swizzled(row, piece), x + (valid ? (first + row) * stride + d : 0), valid);
  }
}

// Where a lane's part of a warp's tile lies. Entry [i][j][e] of the rest of this file is row
// 8 i + g and key 8 j + 2 t + e of it.
struct Lane {
  int g, t, rows, keys;

  __device__ __forceinline__ Lane() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    g = lane / 4, t = lane % 4, rows = warp / 2 * 64, keys = warp % 2 * 32;
  }
  __device__ __forceinline__ int row(int i) const { return rows + 8 * i + g; }
  __device__ __forceinline__ int key(int j, int e) const { return keys + 8 * j + 2 * t + e; }
};

// scores += query [64 of 128, 64] key^T [32 of 64, 64], by warp; `dims` of the slice exist
template <class T>
__device__ __forceinline__ void multiply(float (&scores)[4][4][4], const T* query, const T* key,
                                         const Lane& at, int dims) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kSliceDims / 16; ++step) {
    if (step * 16 >= dims) break;
    uint32_t b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ldmatrix_x4(b[i], key + swizzled(at.keys + 16 * i + lane / 16 * 8 + lane % 8,
                                       2 * step + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      ldmatrix_x4(a, query + swizzled(at.rows + 16 * i + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mma_m16n8k16<T>(scores[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Calls body(first key, scores) for each tile of the task. Of scores, [i / 2][j][i % 2 * 2 + e] is
// entry [i][j][e]; warps whose rows are all padding get zeros. All threads have passed a barrier
// since the body before. `shared` holds the probe and kProbeStages slices of keys.
template <class T, class Body>
__device__ __forceinline__ void for_each_tile(const FlexPrefillCudaParams& p, const ProbeTask& task,
                                              const Lane& at, T* shared, Body body) {
  const int D = static_cast<int>(p.D), slices = (D + kSliceDims - 1) / kSliceDims;
  const int group = static_cast<int>(p.Hq / p.Hkv);
  const T* const query = static_cast<const T*>(p.query) + task.batch * p.query_stride[0] +
                         (task.kv_head * group + task.head % group) * p.query_stride[1] +
                         (p.Tq - p.probe) * p.query_stride[2];
  const T* const key = static_cast<const T*>(p.key) + task.batch * p.key_stride[0] +
                       task.kv_head * p.key_stride[1];
  T* const stages = shared + slices * kProbeRows * kSliceDims;
  const int steps = (task.end - task.begin) * slices;
  const auto stage = [&](int step) {
    return stages + step % kProbeStages * kTileKeys * kSliceDims;
  };
  const auto fetch = [&](int step) {
    if (step < steps)
      copy_slice(stage(step), key, p.key_stride[2], (task.begin + step / slices) * kTileKeys,
                 kTileKeys, p.Tk, step % slices, D);
    cp_async_commit();
  };
  for (int slice = 0; slice < slices; ++slice)
    copy_slice(shared + slice * kProbeRows * kSliceDims, query, p.query_stride[2],
               p.probe - kProbeRows, kProbeRows, p.probe, slice, D);
  for (int step = 0; step < kProbeStages - 1; ++step) fetch(step);

  const bool active = at.rows + 64 > kProbeRows - p.probe;
  for (int step = 0; step < steps;) {
    float scores[4][4][4] = {};
    const int first = (task.begin + step / slices) * kTileKeys;
    for (int slice = 0; slice < slices; ++slice, ++step) {
      cp_async_wait<kProbeStages - 2>();
      __syncthreads();
      fetch(step + kProbeStages - 1);
      if (active)
        multiply(scores, shared + slice * kProbeRows * kSliceDims, stage(step), at,
                 D - slice * kSliceDims);
    }
    body(first, scores);
  }
}

// Whether row `row` sees key `key`: the last row sees all.
__device__ __forceinline__ bool sees(const FlexPrefillCudaParams& p, int row, int key) {
  return key - row <= static_cast<int>(p.Tk) - kProbeRows;
}

// Of kN values per lane, sums over the kN lanes that differ in bits kStride .. kStride * kN / 2;
// lane number i of them gets the sum of value i, in x[0].
template <int kN, int kStride>
__device__ __forceinline__ void transposed_sums(float (&x)[kN]) {
#pragma unroll
  for (int half = kN / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & (half * kStride);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kFullWarp, given, half * kStride);
    }
  }
}

// Largest score, in units of log2, and sum of 2^(score - largest) of each row over a chunk of keys.
template <class T>
__global__ void __launch_bounds__(kProbeThreads, 3)
    probe_extent_kernel(const __grid_constant__ FlexPrefillCudaParams p) {
  SA_SHARED_MEMORY(memory);
  const ProbeTask task(p);
  const Lane at;
  float top[8], sum[8] = {};  // of the lane's own entries
#pragma unroll
  for (int i = 0; i < 8; ++i) top[i] = -kInfinity;
  for_each_tile(p, task, at, reinterpret_cast<T*>(memory), [&](int first, auto& scores) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float x[8], most = top[i];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const bool seen = sees(p, at.row(i), first + at.key(k / 2, k % 2));
        // rounded before the subtraction: a fused one could exceed 0 without bound
        x[k] = seen ? __fmul_rn(scores[i / 2][k / 2][i % 2 * 2 + k % 2], p.log2_scale) : -kInfinity;
        most = fmaxf(most, x[k]);
      }
      const float from = most == -kInfinity ? 0.f : most;
      sum[i] *= exp2_approx(top[i] - from);
      top[i] = most;
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[i] += exp2_approx(x[k] - from);
    }
  });
  // joins the four lanes of a row, then the two halves of the keys
  __syncthreads();
  float* const joined = reinterpret_cast<float*>(memory);  // [2, kProbeRows, 2]
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float other_top = __shfl_xor_sync(kFullWarp, top[i], lanes);
      const float other_sum = __shfl_xor_sync(kFullWarp, sum[i], lanes);
      const float most = fmaxf(top[i], other_top), from = most == -kInfinity ? 0.f : most;
      sum[i] = sum[i] * exp2_approx(top[i] - from) + other_sum * exp2_approx(other_top - from);
      top[i] = most;
    }
    float* const to = joined + (at.keys / 32 * kProbeRows + at.row(i)) * 2;
    if (at.t == 0) to[0] = top[i], to[1] = sum[i];
  }
  __syncthreads();
  const float* const a = joined + threadIdx.x * 2;
  const float* const b = a + kProbeRows * 2;
  const float most = fmaxf(a[0], b[0]), from = most == -kInfinity ? 0.f : most;
  float* const to = p.extent + ((task.head * p.chunks + task.chunk) * kProbeRows + threadIdx.x) * 2;
  to[0] = most, to[1] = a[1] * exp2_approx(a[0] - from) + b[1] * exp2_approx(b[0] - from);
}

// The softmax of a row: weights are share * 2^(score - top), and the mean over the rows sums to 1.
struct RowSoftmax {
  float top, share;
};

// Joins the extents of the chunks of row threadIdx.x; false where the row is not finite.
__device__ __forceinline__ bool join_extents(const FlexPrefillCudaParams& p, int64_t head,
                                             RowSoftmax& row) {
  row = {0.f, 0.f};
  if (static_cast<int>(threadIdx.x) < kProbeRows - p.probe) return true;
  float top = -kInfinity, sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const float* const part = p.extent + ((head * p.chunks + chunk) * kProbeRows + threadIdx.x) * 2;
    const float most = fmaxf(top, part[0]), from = most == -kInfinity ? 0.f : most;
    sum = sum * exp2_approx(top - from) + part[1] * exp2_approx(part[0] - from);
    top = most;
  }
  if (!(fabsf(top) < kInfinity && sum > 0 && sum < kInfinity)) return false;
  row = {top, 1 / (sum * static_cast<float>(p.probe))};
  return true;
}

// Sums of a warp's tile per distance, from each lane's sums [7 + j - i][e], to [kSegments]:
// entry x belongs to place 63 - rows + keys + x, counted from the tile's first key.
__device__ __forceinline__ void sum_distances(const float (&x)[11][2], const Lane& at, float* to) {
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    float turned[4];  // of four runs of eight places each
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int m = 4 * part + k - 1;  // entries at or right of the diagonal of an 8 x 8 square
      turned[k] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 2 * at.t + e;
        const float right = m >= 0 ? x[m < 0 ? 0 : m][e] : 0.f;
        const float left = m + 1 < 11 ? x[m + 1 < 11 ? m + 1 : 0][e] : 0.f;
        // row g is turned by g places, so that lanes g hold place g of the run
        turned[k] += __shfl_sync(kFullWarp, c >= at.g ? right : left, (c - at.g & 7) * 4 + at.t);
      }
    }
    transposed_sums<4, 1>(turned);
    to[32 * part + 8 * at.t + at.g] = turned[0];
  }
}

// The sum of place u from its two parts.
__device__ __forceinline__ float sum_at(const FlexPrefillCudaParams& p, const float* own,
                                        const float* spill, int64_t head, int u) {
  const int chunk_keys = static_cast<int>(p.chunk_tiles) * kTileKeys, chunk = u / chunk_keys;
  const int offset = u - chunk * chunk_keys;
  const float sum = own[head * p.Tk + u];
  if (chunk == 0 || offset >= kProbeRows) return sum;
  return sum + spill[(head * p.chunks + chunk - 1) * kProbeRows + offset];
}

// What the profile kernels keep in shared memory beside the slices.
struct ProfileShared {
  RowSoftmax rows[kProbeRows];
  float distances[4][kSegments];   // by warp
  float keys[2][kTileKeys];        // by half of the rows
  float open[2][kProbeRows];       // sums of places past the tile, of even and odd tiles
  float slash[3 * kTileKeys];      // of the pass before, from the tile's first key
  float vertical[kTileKeys];
};
static_assert(sizeof(ProfileShared) == kProfileSharedBytes);

// Sums the weights of the probe per key and per distance. With kAttribute each weight outside of
// the blocks that every row keeps is split between its key and its distance in proportion to their
// sums, `vertical` and `slash`, of the pass without.
template <class T, bool kAttribute>
__global__ void __launch_bounds__(kProbeThreads, 3)
    probe_profile_kernel(const __grid_constant__ FlexPrefillCudaParams p) {
  SA_SHARED_MEMORY(memory);
  auto& s = *reinterpret_cast<ProfileShared*>(memory);
  T* const slices = reinterpret_cast<T*>(memory + sizeof(ProfileShared));
  const ProbeTask task(p);
  const Lane at;
  const int tid = threadIdx.x, block = static_cast<int>(p.block);
  const int n_queries = static_cast<int>(p.Tq), n_keys = static_cast<int>(p.Tk);
  const bool finite = __syncthreads_and(join_extents(p, task.head, s.rows[tid]));
  if (!kAttribute && task.chunk == 0 && tid == 0) p.finite[task.head] = finite;
  if (!finite) return;

  float* const by_key = (kAttribute ? p.columns : p.vertical) + task.head * p.Tk;
  float* const by_distance = (kAttribute ? p.diagonals : p.slash) + task.head * p.Tk;
  float* const spill = (kAttribute ? p.diagonal_spill : p.slash_spill) +
                       (task.head * p.chunks + task.chunk) * kProbeRows;
  RowSoftmax rows[8];
  int own[8];  // first key of the block in which the row's block of queries begins
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    rows[i] = s.rows[at.row(i)];
    const int query = max(n_queries - kProbeRows + at.row(i), 0);
    own[i] = max(n_keys - n_queries + query / block * block, 0) / block * block;
  }
  const auto load_profiles = [&](int first) {
    for (int x = tid, u = first + tid; x < 3 * kTileKeys; x += kProbeThreads, u += kProbeThreads)
      s.slash[x] = u < n_keys ? sum_at(p, p.slash, p.slash_spill, task.head, u) : 0.f;
    if (tid < kTileKeys)
      s.vertical[tid] = first + tid < n_keys ? p.vertical[task.head * p.Tk + first + tid] : 0.f;
  };
  if (kAttribute) load_profiles(task.begin * kTileKeys);
  s.open[0][tid] = 0;

  int parity = 0;
  for_each_tile(p, task, at, slices, [&](int first, auto& scores) {
    float keys[8] = {}, distances[11][2] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int j = k / 2, e = k % 2;
      const int key = first + at.key(j, e);
      const float vertical = kAttribute ? s.vertical[at.key(j, e)] : 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float score = __fmul_rn(scores[i / 2][j][i % 2 * 2 + e], p.log2_scale);
        const bool counts = kAttribute ? key >= block && key < own[i] : sees(p, at.row(i), key);
        const float weight = counts ? exp2_approx(score - rows[i].top) * rows[i].share : 0.f;
        float column = weight, rest = weight;
        if (kAttribute) {
          const float slash = s.slash[kProbeRows - 1 - at.row(i) + at.key(j, e)];
          column = __fdividef(weight * vertical, fmaxf(vertical + slash, 1e-30f));
          rest = fmaxf(weight - column, 0.f);
        }
        keys[k] += column;
        distances[7 + j - i][e] += rest;
      }
    }
    transposed_sums<8, 4>(keys);
    s.keys[at.rows / 64][at.key(at.g / 2, at.g % 2)] = keys[0];
    sum_distances(distances, at, s.distances[tid / 32]);
    __syncthreads();
    if (tid < kTileKeys && first + tid < n_keys)
      by_key[first + tid] = s.keys[0][tid] + s.keys[1][tid];
    for (int x = tid; x < 3 * kTileKeys; x += kProbeThreads) {
      float sum = x < kProbeRows ? s.open[parity][x] : 0.f;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) {
        const int place = x - (63 - warp / 2 * 64 + warp % 2 * 32);
        if (place >= 0 && place < kSegments) sum += s.distances[warp][place];
      }
      // no later tile reaches the places of this one's keys
      if (x >= kTileKeys)
        s.open[1 - parity][x - kTileKeys] = sum;
      else if (first + x < n_keys)
        by_distance[first + x] = sum;
    }
    if (kAttribute) load_profiles(first + kTileKeys);
    parity = 1 - parity;
  });
  __syncthreads();
  spill[tid] = s.open[parity][tid];
}

}  // namespace sparse_attn
