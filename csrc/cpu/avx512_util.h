// Small AVX-512 pieces that the bf16 kernels share. Internal linkage: units have their own flags.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "../common/params.h"

namespace sparse_attn {
namespace {

// 2^t to a relative 2.6e-6, far inside the rounding of the result to bf16
inline __m512 exp2_bf16(__m512 t) {
  const __m512 f = _mm512_reduce_ps(t, 0x01);  // t - floor(t)
  __m512 y = _mm512_set1_ps(0.013534167615255166f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05201146118846349f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.24144275654988276f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6930038345328182f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0000025933689765f));
  return _mm512_scalef_ps(y, t);  // scales by 2^floor(t)
}

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

inline __mmask32 first_halves(int64_t n) {
  return n >= 32 ? ~__mmask32(0) : n <= 0 ? __mmask32(0) : __mmask32((1u << n) - 1);
}

// 16 x 16 transposition of 32-bit elements
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Queries to lanes: [lanes / 16][D rounded up to 32, / 2][16]; row_of(lane) may be null
template <class RowOf>
inline void pack_lanes(RowOf row_of, int64_t lanes, int64_t D, bool negate, uint32_t* out) {
  const __m512i sign = _mm512_set1_epi16(negate ? static_cast<short>(0x8000) : 0);
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    for (int64_t d = 0; d < round_up(D, 32); d += 32) {
      const __mmask32 mask = first_halves(D - d);
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const uint16_t* from = row_of(lane + i);
        r[i] = from == nullptr
                   ? _mm512_setzero_si512()
                   : _mm512_xor_si512(sign, _mm512_maskz_loadu_epi16(mask, from + d));
      }
      transpose16(r);
      uint32_t* to = out + (lane * round_up(D, 32) + d * 16) / 2;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 16, r[i]);
    }
  }
}

}  // namespace
}  // namespace sparse_attn
