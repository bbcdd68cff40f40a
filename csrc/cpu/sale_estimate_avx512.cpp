// SALE's selection pass on AVX512-VNNI: one vpdpbusd multiplies 64 pairs of codes.
#if defined(__x86_64__)
#include "avx512_util.h"
#include "sale_estimate_tile.h"

namespace sparse_attn {
namespace {

constexpr int kRows = 4;                // two pairs
constexpr int kVectors = kSquare / 16;  // of 16 keys

inline __m512i word(const uint8_t* at) {
  int32_t x;
  std::memcpy(&x, at, sizeof x);
  return _mm512_set1_epi32(x);
}

class VnniEngine {
 public:
  // keys: [chunk / 64][words][64 keys][4 channels], so that one address walks through a square
  static void unpack(const Params& p, const EstimateTask& task, int64_t begin,
                     EstimateScratch& s) {
    const int64_t half = half_bytes(p), words = half / 2;
    for (int64_t k = 0; k < kChunkTokens; k += 16) {
      int8_t* to = s.keys + k / kSquare * kSquare * 2 * half + k % kSquare * 4;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t d = 0; d < half; d += 64) unpack16(p, task, begin + k, d, words, to, sum);
      _mm512_store_si512(s.correction + k, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
  }

  // bits of `wanted` whose 16 keys hold a kept pair
  static unsigned square(const Params& p, const UnitRows& rows, const EstimateScratch& s, int key,
                         unsigned wanted) {
    return p.kv_block == 16 ? search<1>(p, rows, s, key, wanted)
                            : search<2>(p, rows, s, key, wanted);
  }

 private:
  // 64 bytes of 16 keys at a time: their words are turned into lanes, then split into nibbles
  static void unpack16(const Params& p, const EstimateTask& task, int64_t begin, int64_t d,
                       int64_t words, int8_t* to, __m512i& sum) {
    const int64_t left = p.D / 2 - d;
    const __mmask64 mask = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
      const uint8_t* from = p.key + task.batch * p.key_stride[0] +
                            task.kv_head * p.key_stride[1] + (begin + i) * p.key_stride[2] + d;
      r[i] = begin + i < p.Tk ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
    }
    transpose16(r);
    const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    const auto codes = [&](__m512i x) {
      return _mm512_sub_epi8(_mm512_xor_si512(_mm512_and_si512(x, nibble), eight), eight);
    };
    for (int i = 0; i < 16 && d / 4 + i < words / 2; ++i) {
      const __m512i low = codes(r[i]), high = codes(_mm512_srli_epi16(r[i], 4));
      _mm512_store_si512(to + (d / 4 + i) * kSquare * 4, low);
      _mm512_store_si512(to + (words / 2 + d / 4 + i) * kSquare * 4, high);
      sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, eight, low), eight, high);
    }
  }

  // rint of the bias in units of the two steps, NaN as large
  static __m512i steps_of(__m512 bias, __m512 inverse) {
    const __m512 limit = _mm512_set1_ps(kBiasLimit);
    __m512 t = _mm512_min_ps(_mm512_mul_ps(bias, inverse), limit);
    t = _mm512_max_ps(t, _mm512_set1_ps(-kBiasLimit));
    return _mm512_cvtps_epi32(t);
  }

  // kWide vectors of keys share their steps and their block
  template <int kWide>
  static unsigned search(const Params& p, const UnitRows& rows, const EstimateScratch& s, int key,
                         unsigned wanted) {
    const int64_t half = half_bytes(p), words = half / 2;
    const int8_t* keys = s.keys + key * 2 * half;
    unsigned found = 0;
    for (int place = 0; place < rows.places && (found & wanted) != wanted; place += kRows) {
      __m512i c[kRows][kVectors];
      for (int pair = 0; pair < kRows / 2; ++pair) {
        const __m512 inverse = _mm512_set1_ps(rows.inverse[place / 2 + pair]);
        for (int v = 0; v < kVectors; ++v) {
          const __m512i start =
              _mm512_add_epi32(steps_of(_mm512_load_ps(rows.bias + key + v * 16), inverse),
                               _mm512_load_si512(s.correction + key + v * 16));
          c[2 * pair][v] = c[2 * pair + 1][v] = start;
        }
      }
      const uint8_t* q = rows.codes + place * 2 * half;
      for (int64_t w = 0; w < words; ++w) {
        __m512i k[kVectors];
        for (int v = 0; v < kVectors; ++v)
          k[v] = _mm512_load_si512(keys + (w * kSquare + v * 16) * 4);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i x = word(q + r * 2 * half + w * 4);
          for (int v = 0; v < kVectors; ++v) c[r][v] = _mm512_dpbusd_epi32(c[r][v], x, k[v]);
        }
      }
      for (int v = 0; v < kVectors; v += kWide)
        if (exceeds<kWide>(rows, s, place, key, v, c)) found |= ((1u << kWide) - 1) << v;
    }
    return found & wanted;
  }

  template <int kWide>
  static bool exceeds(const UnitRows& rows, const EstimateScratch& s, int place, int key, int v,
                      const __m512i (&c)[kRows][kVectors]) {
    const __m512 key_step = _mm512_load_ps(s.key_step + key + v * 16);
    __mmask16 kept = 0;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __m512i top = c[r][v];
      if constexpr (kWide == 2) top = _mm512_max_epi32(top, c[r][v + 1]);
      const __m512 unit =
          _mm512_mul_ps(_mm512_set1_ps(rows.step[(place + r) / 2]), key_step);
      const __m512 x = _mm512_mul_ps(unit, _mm512_cvtepi32_ps(top));
      // not less or equal: NaN is kept
      kept |= _mm512_cmp_ps_mask(x, _mm512_set1_ps(rows.theta[place + r]), _CMP_NLE_UQ);
    }
    return kept != 0;
  }
};

}  // namespace

const EstimateKernel kEstimateAvx512 = {scratch_bytes, run<VnniEngine>};

}  // namespace sparse_attn
#endif
