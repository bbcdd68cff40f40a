// What decoding with AVX512-BF16 multiplies with: one vdpbf16ps multiplies 16 pairs and adds to 16
// sums.
//
// Scores pair up neighbouring dimensions, as they lie. Values pair up neighbouring keys: two rows
// are interleaved, which leaves the sums of 32 dimensions in two vectors, for the dimensions
// 8 j + 0..3 (lanes 4 j + 0..3 of the first) and 8 j + 4..7 (the same lanes of the second).
#pragma once
#include "avx512_util.h"
#include "block_sparse_attention_decode.h"

namespace sparse_attn {
namespace {

// lane i of the result: the sum of the lanes of x[i]
inline __m512 sums_of_lanes(__m512 (&x)[16]) {
  for (int i = 0; i < 8; ++i)
    x[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                         _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(x[2 * i]), b = _mm512_castps_pd(x[2 * i + 1]);
    x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int n = 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i)
      x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd));
  return x[0];
}

// kFetch: whether to fetch the next group, which keys in one piece do not need.
template <int kRowCount, bool kFetch = true>
class Bf16Math {
 public:
  static constexpr int kRows = kRowCount;

  Bf16Math(const Params& p, const DecodeScratch& s)
      : s_(s), D_(p.D), Dv_(p.Dv), q_stride_(round_up(p.D, 32)), out_stride_(round_up(p.Dv, 32)),
        q_(reinterpret_cast<uint16_t*>(s.q)) {}

  void set_query(int r, const char* from) {
    uint16_t* q = q_ + r * q_stride_;
    std::memset(q, 0, q_stride_ * sizeof(uint16_t));
    std::memcpy(q, from, D_ * sizeof(uint16_t));
  }

  void score(const Rows& keys, const Rows& next) {
    for (int k = 0; k < kGroupKeys; k += kBatch) {
      __m512 sum[16] = {};  // [row][key]
      int64_t d = 0;
      if constexpr (kRows == 1)
        for (; d + 128 <= D_; d += 128) multiply_in_order(sum, keys + k, next + k, d);
      for (; d + 32 <= D_; d += 32) multiply(sum, keys + k, next + k, d, ~__mmask32(0));
      if (d < D_) multiply(sum, keys + k, next + k, d, first_halves(D_ - d));
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, sums_of_lanes(sum));
      for (int r = 0; r < kRows; ++r)
        std::memcpy(s_.scores + r * kGroupKeys + k, lanes + r * kBatch, kBatch * sizeof(float));
    }
  }

  void add(const Rows& values, const Rows& next) {
    alignas(64) uint32_t pairs[kRows][kGroupKeys / 2];  // weights of two keys each
    for (int r = 0; r < kRows; ++r) {
      const float* w = s_.scores + r * kGroupKeys;
      _mm512_store_si512(pairs[r], (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(w + 16),
                                                                _mm512_load_ps(w)));
    }
    int64_t d = 0;
    if constexpr (kMostVectors >= 8)
      for (; d + 256 <= Dv_; d += 256) add_slice<8>(values, next, pairs, d);
    if constexpr (kMostVectors >= 4)
      for (; d + 128 <= Dv_; d += 128) add_slice<4>(values, next, pairs, d);
    if constexpr (kMostVectors >= 2)
      for (; d + 64 <= Dv_; d += 64) add_slice<2>(values, next, pairs, d);
    for (; d + 32 <= Dv_; d += 32) add_slice<1>(values, next, pairs, d);
    if (d < Dv_) add_slice<1>(values, next, pairs, d, first_halves(Dv_ - d));
  }

  void rescale(int r, float factor) {
    float* out = s_.out + r * out_stride_;
    for (int64_t d = 0; d < out_stride_; d += 16)
      _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), _mm512_set1_ps(factor)));
  }

  void read_out(int r, float* to) const {
    const float* out = s_.out + r * out_stride_;
    for (int64_t d = 0; d < Dv_; ++d)
      to[d] = out[d / 32 * 32 + d % 8 / 4 * 16 + d % 32 / 8 * 4 + d % 4];
  }

 private:
  // keys whose sums are built at once: sixteen sums for any number of rows
  static constexpr int kBatch = kRows == 1 ? 16 : kRows == 2 ? 8 : kRows <= 4 ? 4 : 2;
  static constexpr int kMostVectors = 8 / kRows;  // of a slice: sixteen sums again

  // 128 dimensions of sixteen keys, key after key: lines that lie in order are fetched ahead by
  // the machine itself.
  void multiply_in_order(__m512 (&sum)[16], const char* const* keys, const char* const* next,
                         int64_t d) const {
    __m512bh q[4];
    for (int v = 0; v < 4; ++v) q[v] = (__m512bh)_mm512_loadu_si512(q_ + d + v * 32);
    for (int i = 0; i < kBatch; ++i)
      for (int v = 0; v < 4; ++v) {
        const int64_t at = 2 * d + v * 64;
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_loadu_si512(keys[i] + at), q[v]);
        fetch(next[i] + at);
      }
  }

  void fetch(const char* line) const {
    if constexpr (kFetch) prefetch(line);
  }

  void multiply(__m512 (&sum)[16], const char* const* keys, const char* const* next, int64_t d,
                __mmask32 mask) const {
    __m512bh key[kBatch];
    for (int i = 0; i < kBatch; ++i) {
      key[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, keys[i] + 2 * d);
      fetch(next[i] + 2 * d);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto q = (__m512bh)_mm512_loadu_si512(q_ + r * q_stride_ + d);
      for (int i = 0; i < kBatch; ++i)
        sum[r * kBatch + i] = _mm512_dpbf16_ps(sum[r * kBatch + i], key[i], q);
    }
  }

  // out [kRows][32 kVectors from d] += weights * values
  template <int kVectors>
  void add_slice(const Rows& values, const Rows& next,
                 const uint32_t (&pairs)[kRows][kGroupKeys / 2], int64_t d,
                 __mmask32 mask = ~__mmask32(0)) {
    __m512 sum[kRows][2 * kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2 * kVectors; ++v)
        sum[r][v] = _mm512_load_ps(s_.out + r * out_stride_ + d + v * 16);
    for (int k = 0; k < kGroupKeys; k += 2) {
      for (int v = 0; v < kVectors; ++v) {
        const __m512i x = _mm512_maskz_loadu_epi16(mask, values[k] + 2 * (d + v * 32));
        const __m512i y = _mm512_maskz_loadu_epi16(mask, values[k + 1] + 2 * (d + v * 32));
        fetch(next[k] + 2 * (d + v * 32));
        fetch(next[k + 1] + 2 * (d + v * 32));
        const auto low = (__m512bh)_mm512_unpacklo_epi16(x, y);
        const auto high = (__m512bh)_mm512_unpackhi_epi16(x, y);
        for (int r = 0; r < kRows; ++r) {
          const auto w = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[r][k / 2]));
          sum[r][2 * v] = _mm512_dpbf16_ps(sum[r][2 * v], low, w);
          sum[r][2 * v + 1] = _mm512_dpbf16_ps(sum[r][2 * v + 1], high, w);
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2 * kVectors; ++v)
        _mm512_store_ps(s_.out + r * out_stride_ + d + v * 16, sum[r][v]);
  }

  const DecodeScratch& s_;
  const int64_t D_, Dv_, q_stride_, out_stride_;
  uint16_t* const q_;  // [rows][D rounded up to 32]
};

}  // namespace
}  // namespace sparse_attn
