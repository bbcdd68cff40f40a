// How the bf16 tile kernel keeps its operands, and what packs them.
//
// Queries stand in SIMD lanes: a tile computes S^T = K Q^T and O^T += V^T P^T, so that the softmax
// works lane by lane and K is read where it lies. Both products contract over pairs of bf16, hence
//   Q   [lane block][2][D / 2][16]            packed once per tile
//   P   [group][lane block][2][16 pairs][16]  written by the softmax
//   V^T [group][Dv][32 keys]                  packed once per call, or per tile
#pragma once
#include <cmath>
#include <cstring>

#include "avx512_util.h"
#include "block_sparse_attention.h"

namespace sparse_attn {
namespace {

using Params = BlockSparseAttentionParams;

constexpr int kChunk = 8;    // groups whose P is kept before it is multiplied by V
constexpr int kLanes = 32;   // queries of a lane block: two vectors
constexpr int kBlocks = kMaxRows / kLanes;
constexpr int kMaxJobs = 64;

// out [32 d][32] += values[i] [32 d][32 keys] * p[i] [2][16 pairs][16] over i < n
struct SumJob {
  float* out;
  int n;
  const uint16_t* values[kChunk];
  const uint32_t* p[kChunk];
};

// not std::min: a template of the standard library compiled here could serve older machines too
template <class T, class U>
inline T lesser(T a, U b) {
  return a < static_cast<T>(b) ? a : static_cast<T>(b);
}
template <class T, class U>
inline T greater(T a, U b) {
  return a > static_cast<T>(b) ? a : static_cast<T>(b);
}

inline int64_t padded_d(const Params& p) { return round_up(p.D, 32); }
inline int64_t padded_dv(const Params& p) { return round_up(p.Dv, 32); }

// V^T of one group: [padded Dv][32 keys]; keys beyond `n` and columns beyond Dv become zero
template <class RowOf>
inline void transpose_values(const Params& p, RowOf row_of, int n, uint16_t* out) {
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
      3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < padded_dv(p); d += 32) {
    const __mmask32 mask = first_halves(p.Dv - d);
    __m512i a[16], b[16];  // key pairs of columns d .. d + 15 and d + 16 .. d + 31
    for (int k = 0; k < 16; ++k) {
      const __m512i x = 2 * k < n ? _mm512_maskz_loadu_epi16(mask, row_of(2 * k) + d)
                                  : _mm512_setzero_si512();
      const __m512i y = 2 * k + 1 < n ? _mm512_maskz_loadu_epi16(mask, row_of(2 * k + 1) + d)
                                      : _mm512_setzero_si512();
      a[k] = _mm512_permutex2var_epi16(x, low, y);
      b[k] = _mm512_permutex2var_epi16(x, high, y);
    }
    transpose16(a);
    transpose16(b);
    for (int k = 0; k < 16; ++k) {
      _mm512_store_si512(out + (d + k) * kGroupKeys, a[k]);
      _mm512_store_si512(out + (d + 16 + k) * kGroupKeys, b[k]);
    }
  }
}

inline const uint16_t* row(const void* base, const int64_t stride[3], int64_t b, int64_t h,
                           int64_t t) {
  return static_cast<const uint16_t*>(base) + b * stride[0] + h * stride[1] + t * stride[2];
}

inline const uint16_t* cached_row(const Params& p, const void* base, const int64_t stride[3],
                                  int64_t b, int64_t h, int64_t t) {
  return reinterpret_cast<const uint16_t*>(cached(p, base, stride, b, h, t));
}

int64_t packed_bytes(const Params& p) {
  return round_up(p.Tk, kGroupKeys) * padded_dv(p) * static_cast<int64_t>(sizeof(uint16_t));
}

void pack(const Params& p, int64_t batch, int64_t kv_head, int64_t begin, int64_t end,
          void* packed) {
  for (int64_t g = begin; g < end; ++g) {
    const int64_t n = lesser(kGroupKeys, p.Tk - g * kGroupKeys);
    transpose_values(
        p,
        [&](int k) {
          return cached_row(p, p.value, p.value_stride, batch, kv_head, g * kGroupKeys + k);
        },
        static_cast<int>(n),
        static_cast<uint16_t*>(packed) + g * kGroupKeys * padded_dv(p));
  }
}

struct Scratch {
  uint32_t* q;          // [kBlocks][2][padded D / 2][16]
  float* scores[2];     // [32 keys][kLanes]
  uint32_t* p[2];       // [kChunk][kBlocks][2][16][16]
  float* out;           // [kBlocks][padded Dv][kLanes]
  uint16_t* keys[2];    // [kChunk][32][padded D]
  uint16_t* values[2];  // [kChunk][padded Dv][32]
  float* max;           // [kMaxRows] raw score that was subtracted
  float* sum;           // [kMaxRows]
  int32_t* position;    // [kMaxRows]

  static int64_t layout(const Params& p, char* base, Scratch* s) {
    char* at = base;
    const auto take = [&at](auto*& pointer, int64_t bytes) {
      pointer = reinterpret_cast<decltype(+pointer)>(at);
      at += round_up(bytes, 64);
    };
    Scratch t;
    take(t.q, kMaxRows * padded_d(p) * 2);
    take(t.out, kMaxRows * padded_dv(p) * 4);
    for (int i = 0; i < 2; ++i) {
      take(t.scores[i], kGroupKeys * kLanes * 4);
      take(t.p[i], kChunk * kGroupKeys * kMaxRows * 2);
      take(t.keys[i], kChunk * kGroupKeys * padded_d(p) * 2);
      take(t.values[i], kChunk * kGroupKeys * padded_dv(p) * 2);
    }
    take(t.max, kMaxRows * 4);
    take(t.sum, kMaxRows * 4);
    take(t.position, kMaxRows * 4);
    if (s != nullptr) *s = t;
    return at - base;
  }
};

int64_t scratch_bytes(const Params& p) { return Scratch::layout(p, nullptr, nullptr); }

}  // namespace
}  // namespace sparse_attn
