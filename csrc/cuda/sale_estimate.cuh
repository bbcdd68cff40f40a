// sale_estimate: sparse_attn/reference/sale_estimate.py says what, to the bit.
//
// A warp owns a unit, 64 queries of one head, whose codes stay in registers; the four units of a
// block of threads share a KV head, so that each key is loaded once for all of them. Keys come 128
// at a time. Of a block of keys a lane has one step for all keys and one for each two of its rows,
// so the bias goes into the integer product, the largest integer of a row decides, and only that is
// turned into a score. Lanes keep bits of their own, 32 blocks to a word, joined at its end.
#pragma once
#include "sale_codes.cuh"
#include "sale_estimate_params.h"
#include "sale_region.cuh"

namespace sparse_attn {

constexpr uint32_t kAllLanes = 0xffffffff;

__device__ __forceinline__ float reciprocal(float step) {
  return step == 0 ? 0.f : __fdiv_rn(1.f, step);
}

// Per head and block of keys a record: bias / step of each key, first those of the keys that lane
// t = 0 has (8 n + 2 t + e, ascending), then of t = 1 and so on; the steps of the four groups; the
// largest size of the first, NaN above all.
__global__ void __launch_bounds__(kPrepareThreads)
    sale_prepare_kernel(const __grid_constant__ SaleEstimateCudaParams p) {
  SA_SHARED_MEMORY(memory);
  auto* const most = reinterpret_cast<int*>(memory);  // by block of keys
  const int kv_block = static_cast<int>(p.kv_block), tid = threadIdx.x;
  const int64_t parts = (p.Nk * kv_block + kPrepareThreads - 1) / kPrepareThreads;
  const int64_t head = blockIdx.x / parts, key = blockIdx.x % parts * kPrepareThreads + tid;
  const int64_t block = key / kv_block, kv = head / p.Hq * p.Hkv + head % p.Hq / (p.Hq / p.Hkv);
  const int place = tid % kv_block, t = place % 8 / 2;
  const float* const steps = p.key_step + (kv * p.Nk + block) * 4;
  const bool exists = block < p.Nk;
  float scaled = 0;
  if (exists && key < p.Tk) scaled = __fmul_rn(p.key_bias[head * p.Tk + key], reciprocal(steps[t]));
  if (place == 0) most[tid / kv_block] = 0;
  __syncthreads();
  atomicMax(most + tid / kv_block, __float_as_int(scaled) & 0x7fffffff);
  __syncthreads();
  if (!exists) return;
  float* const record = p.records + (head * p.Nk + block) * (kv_block + kRecordExtra);
  record[t * (kv_block / 4) + place / 8 * 2 + place % 2] = scaled;
  if (place < kRecordExtra)
    record[kv_block + place] = place < 4 ? steps[place] : __int_as_float(most[tid / kv_block]);
}

__global__ void __launch_bounds__(kPrepareThreads)
    sale_invert_kernel(const __grid_constant__ SaleEstimateCudaParams p) {
  const int64_t i = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x;
  if (i < p.B * p.Hq * ((p.Tq + 15) / 16) * 8) p.inverse[i] = reciprocal(p.query_step[i]);
}

// Copies the codes of keys to rows of row_bytes.
__global__ void __launch_bounds__(kPrepareThreads)
    sale_pad_kernel(const __grid_constant__ SaleEstimateCudaParams p) {
  const int64_t i = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x;
  const int64_t row = i / p.row_bytes, byte = i % p.row_bytes;
  const int64_t head = row / p.Tk;
  if (head >= p.B * p.Hkv) return;
  const uint8_t* const from = p.key + head / p.Hkv * p.key_stride[0] +
                              head % p.Hkv * p.key_stride[1] + row % p.Tk * p.key_stride[2];
  p.padded[i] = byte < p.D / 2 ? from[byte] : uint8_t{0};
}

// Where a warp's keys come from, and the records of its head.
struct CodeSource {
  const uint8_t* codes;
  int64_t stride;  // bytes
  const float* records;

  __device__ __forceinline__ CodeSource(const SaleEstimateCudaParams& p, int batch, int kv_head,
                                       int64_t head) {
    const bool padded = p.D % 32 != 0;
    stride = padded ? p.row_bytes : p.key_stride[2];
    codes = padded ? p.padded + (batch * p.Hkv + kv_head) * p.Tk * stride
                   : p.key + batch * p.key_stride[0] + kv_head * p.key_stride[1];
    records = p.records + head * p.Nk * (p.kv_block + kRecordExtra);
  }
};

// One of two stages in shared memory.
template <int kWords, int kKeyTiles>
struct EstimateStage {
  static constexpr int kBlock = 8 * kKeyTiles, kBlocks = kStageKeys / kBlock;
  static constexpr int kRecord = kBlock + kRecordExtra;  // numbers
  static constexpr int kKeyBytes = kStageKeys * kWords * 16;
  static constexpr int kRecordBytes = kBlocks * kRecord * 4;  // of a unit
  static constexpr int kBytes = kKeyBytes + kEstimateThreads / 32 * kRecordBytes;

  unsigned char* base;

  // 16 bytes of a key; of long rows the halves of every other are swapped, because of the banks
  __device__ __forceinline__ unsigned char* key(int row, int chunk) const {
    return base + (row * kWords + (kWords == 8 ? chunk ^ (row & 1) * 4 : chunk)) * 16;
  }
  __device__ __forceinline__ float* records(int warp) const {
    return reinterpret_cast<float*>(base + kKeyBytes + warp * kRecordBytes);
  }

  // Starts to copy the stage's keys, and the records of the warp's head where there is one.
  __device__ __forceinline__ void copy(const SaleEstimateCudaParams& p, const CodeSource& source,
                                       int index, bool has_unit) const {
    const int row_bytes = static_cast<int>(p.row_bytes);
#pragma unroll
    for (int i = 0; i < kStageKeys * kWords / kEstimateThreads; ++i) {
      const int at = i * kEstimateThreads + static_cast<int>(threadIdx.x);
      const int row = at / kWords, chunk = at % kWords;
      const int token = index * kStageKeys + row;
      const bool valid = token < static_cast<int>(p.Tk) && chunk * 16 < row_bytes;
      cp_async_16(key(row, chunk), source.codes + (valid ? token * source.stride + chunk * 16 : 0),
                  valid);
    }
    if (!has_unit) return;
    const int first = index * kBlocks;
    const float* const record = source.records + int64_t{first} * kRecord;
    float* const to = records(threadIdx.x / 32);
    for (int i = threadIdx.x % 32 * 4; i < kBlocks * kRecord; i += 128) {
      const bool valid = first + i / kRecord < static_cast<int>(p.Nk);
      cp_async_16(to + i, valid ? record + i : p.records, valid);
    }
  }
};

// What a lane needs of its rows once for each block of keys; in shared memory, the same for the
// lanes of a row. [i][g] has rows g and g + 8 of tiles 2 i and 2 i + 1.
struct UnitRows {
  Pack<float, 4> theta[2][8];
  Pack<int, 4> excess[2][8];
  Pack<float, 4> step[8];  // of both rows of each tile
};
static_assert(sizeof(UnitRows) == kUnitBytes);

// What a lane keeps of its unit, four tiles of 16 queries: rows g = lane / 4 and g + 8 of each.
template <int kWords, bool kInt4>
struct EstimateUnit {
  QueryCodes<kWords, kInt4> codes[4];
  float inverse[4];    // one by the steps of both rows
  float most_inverse;  // of all rows, NaN above all
  uint32_t kept[4];    // bits of the blocks of the running word

  // Rows that do not exist are as one that does, of the same query block.
  __device__ __forceinline__ void load(const SaleEstimateCudaParams& p, const uint8_t* query,
                                       int64_t head, int chunk, UnitRows& rows) {
    constexpr float kSmallestNormal = 1.17549435e-38f;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int n_queries = static_cast<int>(p.Tq), bytes = static_cast<int>(p.D / 2);
    const int64_t tiles = (p.Tq + 15) / 16;
    int most = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int tile = min(chunk * 4 + m, (n_queries - 1) / 16);
      int row[2] = {tile * 16 + g, tile * 16 + g + 8};
      if (row[0] >= n_queries) row[0] = tile * 16;
      if (row[1] >= n_queries) row[1] = row[0];
      uint32_t words[2][kWords];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint8_t* const from = query + row[h] * p.query_stride[2];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const int byte = word_place<kWords>(t, i) * 4;
          words[h][i] = byte < bytes ? *reinterpret_cast<const uint32_t*>(from + byte) : 0;
        }
        const float bar = p.theta[head * p.Tq + row[h]];
        if (t == 0) rows.theta[m / 2][g][m % 2 * 2 + h] = fabsf(bar) < kSmallestNormal ? 0.f : bar;
      }
      int sum[2];
      codes[m].set(words[0], words[1], sum);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 1);
        sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 2);
        if (t == 0) rows.excess[m / 2][g][m % 2 * 2 + h] = 8 * sum[h];
      }
      const int64_t group = (head * tiles + tile) * 8 + row[0] % 8;
      if (t == 0) rows.step[g][m] = p.query_step[group];
      inverse[m] = p.inverse[group];
      most = max(most, __float_as_int(inverse[m]) & 0x7fffffff);
      kept[m] = 0;
    }
    most_inverse = __int_as_float(__reduce_max_sync(kAllLanes, most));
  }

  // Sets `bit` of the tiles that keep a block of keys. With kSmall every rounded bias is below
  // 2^21 in size: it and the sums are then the low bits of a float, 1.5 * 2^23 and more.
  template <bool kSmall, class Stage>
  __device__ __forceinline__ void scan(const Stage& stage, const float* record, int block,
                                       uint32_t bit, const UnitRows& rows) {
    constexpr float kUnits = 12582912.f, kLimit = 1073741824.f;
    constexpr int kTiles = Stage::kBlock / 8;
    constexpr int kUnrolled = kWords == 8 ? 1 : kTiles == 8 ? 2 : kTiles;  // of registers
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int most[4][2];
#pragma unroll
    for (int m = 0; m < 4; ++m) most[m][0] = most[m][1] = -0x7fffffff - 1;
#pragma unroll kUnrolled
    for (int n = 0; n < kTiles; ++n) {
      uint32_t words[kWords];
      const int row = block * Stage::kBlock + 8 * n + g;
      if constexpr (kWords == 2) {
        *reinterpret_cast<Pack<uint32_t, 2>*>(words) =
            *reinterpret_cast<const Pack<uint32_t, 2>*>(stage.key(row, t / 2) + t % 2 * 8);
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i)
          *reinterpret_cast<uint4*>(words + 4 * i) =
              *reinterpret_cast<const uint4*>(stage.key(row, 4 * i + t));
      }
      const KeyCodes<kWords, kInt4> key(words);
      const float* const bias = record + t * (Stage::kBlock / 4) + 2 * n;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        int d[4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = __fmul_rn(bias[e], inverse[m]);
          if constexpr (kSmall) {
            d[e] = d[e + 2] = __float_as_int(__fadd_rn(x, kUnits));
          } else {
            const float low = x < kLimit ? x : kLimit;
            d[e] = d[e + 2] = __float2int_rn(low > -kLimit ? low : -kLimit);
          }
        }
        add_products(d, codes[m], key);
        most[m][0] = max(most[m][0], max(d[0], d[1]));
        most[m][1] = max(most[m][1], max(d[2], d[3]));
      }
    }
    const float key_step = record[Stage::kBlock + t];
    const Pack<float, 4> step = rows.step[g];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Pack<float, 4> theta = rows.theta[i][g];
      const Pack<int, 4> excess = kInt4 ? Pack<int, 4>{} : rows.excess[i][g];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int m = 2 * i + k;
        const float both = __fmul_rn(step[m], key_step);
        bool keep = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int n = most[m][h] - excess[2 * k + h];
          const float x = kSmall ? __fsub_rn(__int_as_float(n), kUnits) : __int2float_rn(n);
          keep |= !(__fmul_rn(both, x) <= theta[2 * k + h]);
        }
        if (keep) kept[m] |= bit;
      }
    }
  }

  // Writes the running word of the unit's rows of the mask, 64 queries or a query block each.
  __device__ __forceinline__ void flush(const SaleEstimateCudaParams& p, int64_t head, int chunk,
                                        int word) {
    const int parts = kUnitRows / static_cast<int>(min(p.q_block, int64_t{kUnitRows}));
#pragma unroll
    for (int m = 0; m < 4; ++m) kept[m] = __reduce_or_sync(kAllLanes, kept[m]);
    if (threadIdx.x % 32 == 0)
      for (int i = 0; i < parts; ++i) {
        const int64_t row = int64_t{chunk} * parts + i;
        uint32_t all = 0;
#pragma unroll
        for (int m = 0; m < 4; ++m)
          if (m * parts / 4 == i) all |= kept[m];
        if (row < p.mask_rows) p.mask[(head * p.mask_rows + row) * p.words + word] = all;
      }
#pragma unroll
    for (int m = 0; m < 4; ++m) kept[m] = 0;
  }
};

template <int kWords, int kKeyTiles, bool kInt4>
__device__ __forceinline__ void estimate(const SaleEstimateCudaParams& p, unsigned char* memory) {
  using Stage = EstimateStage<kWords, kKeyTiles>;
  constexpr int kBlocks = Stage::kBlocks, kWarps = kEstimateThreads / 32;
  const int warp = threadIdx.x / 32, block_of_threads = static_cast<int>(blockIdx.x);
  const int Hkv = static_cast<int>(p.Hkv), group = static_cast<int>(p.Hq) / Hkv;
  const int units = static_cast<int>(p.units), splits = static_cast<int>(p.splits);
  const int tiles = (units + kWarps - 1) / kWarps;
  const int split = block_of_threads % splits, rest = block_of_threads / splits;
  // the last queries see most keys: first, so that the short rows fill the gaps at the end
  const int kv = rest / tiles, first_unit = (tiles - 1 - rest % tiles) * kWarps;
  const int unit = first_unit + warp, chunk = unit / group;
  const bool has_unit = unit < units;
  const int batch = kv / Hkv, kv_head = kv % Hkv, own_head = kv_head * group + unit % group;
  const int64_t head = batch * p.Hq + own_head;
  const auto region = [&](int c, bool last) {
    const int row = last ? min((c + 1) * kUnitRows, static_cast<int>(p.Tq)) - 1 : c * kUnitRows;
    return SaleRegion(p, row / static_cast<int>(p.q_block));
  };
  // the blocks of all units, of which a split takes a share of whole words
  const int last_chunk = (min(first_unit + kWarps, units) - 1) / group;
  int begin = region(first_unit / group, false).sink, end = region(last_chunk, true).local;
  const int first_word = begin / 32, n_words = max((end + 31) / 32 - first_word, 0);
  const int per_split = (n_words + splits - 1) / splits;
  const auto share = [&](int i) { return (first_word + i * per_split) * 32; };
  begin = max(begin, share(split)), end = min(end, share(split + 1));
  if (begin >= end) return;
  const int own_begin = has_unit ? max(begin, region(chunk, false).sink) : end;
  const int own_end = has_unit ? min(end, region(chunk, true).local) : end;

  auto& rows = *reinterpret_cast<UnitRows*>(memory + 2 * Stage::kBytes + warp * kUnitBytes);
  EstimateUnit<kWords, kInt4> mine;
  const uint8_t* const query =
      p.query + batch * p.query_stride[0] + own_head * p.query_stride[1];
  if (has_unit) mine.load(p, query, head, chunk, rows);
  const CodeSource source(p, batch, kv_head, head);
  const int last = (end + kBlocks - 1) / kBlocks;
  const auto stage_of = [&](int i) { return Stage{memory + (i & 1) * Stage::kBytes}; };
  stage_of(begin / kBlocks).copy(p, source, begin / kBlocks, has_unit);
  cp_async_commit();
  for (int i = begin / kBlocks; i < last; ++i) {
    cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < last) stage_of(i + 1).copy(p, source, i + 1, has_unit);
    cp_async_commit();
    if (!has_unit) continue;
    const Stage stage = stage_of(i);
    for (int b = 0; b < kBlocks; ++b) {
      const int block = i * kBlocks + b;
      if (block < own_begin || block >= own_end) continue;
      const float* const record = stage.records(warp) + b * Stage::kRecord;
      const uint32_t bit = 1u << block % 32;
      if (__fmul_rn(record[Stage::kBlock + 4], mine.most_inverse) < 2097152.f)
        mine.template scan<true>(stage, record, b, bit, rows);
      else
        mine.template scan<false>(stage, record, b, bit, rows);
    }
    if ((i + 1) * kBlocks % 32 == 0 || i + 1 == last)
      mine.flush(p, head, chunk, i * kBlocks / 32);
  }
}

// Which blocks of the middle hold a kept pair: the mask.
template <int kWords, int kKeyTiles>
__global__ void __launch_bounds__(kEstimateThreads, kWords == 8 ? 2 : 3)
    sale_estimate_kernel(const __grid_constant__ SaleEstimateCudaParams p) {
  SA_SHARED_MEMORY(memory);
  estimate<kWords, kKeyTiles, kNativeInt4>(p, memory);
}

// The bits of a word that stand for the blocks [begin, end).
__device__ __forceinline__ uint32_t bits_of(int word, int begin, int end) {
  const auto below = [](int n) { return n >= 32 ? kAllLanes : n <= 0 ? 0u : (1u << n) - 1; };
  return below(end - 32 * word) & ~below(begin - 32 * word);
}

// Lists what a query block keeps.
__global__ void __launch_bounds__(kListThreads)
    sale_list_kernel(const __grid_constant__ SaleEstimateCudaParams p) {
  SA_SHARED_MEMORY(memory);
  auto* const sums = reinterpret_cast<int*>(memory);  // by warp
  const int64_t head = blockIdx.x / p.Mq;
  const int query_block = static_cast<int>(blockIdx.x % p.Mq), blocks = static_cast<int>(p.Nk);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const SaleRegion region(p, query_block);
  const int64_t row = query_block * p.q_block + tid;
  const bool open = tid < p.q_block && row < p.Tq && !(p.theta[head * p.Tq + row] > -kInfinity);
  const bool every = __syncthreads_or(open);
  const int64_t per_block = (p.q_block + kUnitRows - 1) / kUnitRows;  // rows of the mask
  const int64_t first_row = query_block * per_block;
  const int64_t end_row = min(first_row + per_block, p.mask_rows);
  int32_t* const indices = p.indices + int64_t{blockIdx.x} * p.Nk;
  int count = 0;
  for (int first = 0; first * 32 < region.seen; first += kListThreads) {
    const int word = first + tid;
    uint32_t bits = bits_of(word, region.sink, region.local);
    if (bits != 0 && !every) {
      uint32_t kept = 0;
      for (int64_t i = first_row; i < end_row; ++i)
        kept |= p.mask[(head * p.mask_rows + i) * p.words + word];
      bits &= kept;
    }
    bits |= bits_of(word, 0, region.sink) | bits_of(word, region.local, region.seen);
    const int own = __popc(bits);
    int before = own;  // the count up to the lane
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, lanes);
      if (lane >= lanes) before += other;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    int place = count + before - own;
    for (int i = 0; i < kListThreads / 32; ++i) {
      if (i < warp) place += sums[i];
      count += sums[i];
    }
    for (; bits != 0; bits &= bits - 1) indices[place++] = word * 32 + __ffs(bits) - 1;
    __syncthreads();
  }
  for (int i = count + tid; i < blocks; i += kListThreads) indices[i] = 0;
  if (tid == 0) p.counts[blockIdx.x] = count;
}

}  // namespace sparse_attn
