// SALE's selection pass on AVX2: vpmaddubsw, whose sums of 4-bit products fit 16 bits for long.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "sale_estimate_tile.h"

namespace sparse_attn {
namespace {

constexpr int kRows = 4;        // two pairs
constexpr int kGroup = 16;      // keys held in registers: two vectors with the same steps
constexpr int64_t kFits = 128;  // words: 128 * 2 * 15 * 7 < 2^15

inline __m256i word(const uint8_t* at) {
  int32_t x;
  std::memcpy(&x, at, sizeof x);
  return _mm256_set1_epi32(x);
}

// 8 x 8 transposition of 32-bit elements
inline void transpose8(__m256i r[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

class MaddEngine {
 public:
  // keys: [chunk / 64][words][64 keys][4 channels]
  static void unpack(const Params& p, const EstimateTask& task, int64_t begin,
                     EstimateScratch& s) {
    const int64_t half = half_bytes(p), words = half / 2;
    for (int64_t k = 0; k < kChunkTokens; k += 8) {
      int8_t* to = s.keys + k / kSquare * kSquare * 2 * half + k % kSquare * 4;
      __m256i sum = _mm256_setzero_si256();
      for (int64_t d = 0; d < half; d += 32) unpack8(p, task, begin + k, d, words, to, sum);
      _mm256_store_si256(reinterpret_cast<__m256i*>(s.correction + k),
                         _mm256_sub_epi32(_mm256_setzero_si256(), sum));
    }
  }

  // bits of `wanted` whose 16 keys lie in a block with a kept pair
  static unsigned square(const Params& p, const UnitRows& rows, const EstimateScratch& s, int key,
                         unsigned wanted) {
    const int64_t half = half_bytes(p), words = half / 2, per = p.kv_block / kGroup;
    unsigned found = 0;
    for (int place = 0; place < rows.places && (found & wanted) != wanted; place += kRows) {
      for (int g = 0; g < kSquare / kGroup; ++g) {
        if (!((wanted & ~found) >> g & 1)) continue;
        __m256i c[kRows][2];
        multiply(rows.codes + place * 2 * half, 2 * half,
                 s.keys + key * 2 * half + g * kGroup * 4, words, c);
        if (exceeds(rows, s, place, key + g * kGroup, c))
          found |= ((1u << per) - 1) << g / per * per;
      }
    }
    return found & wanted;
  }

 private:
  // 32 bytes of 8 keys at a time: their words are turned into lanes, then split into nibbles
  static void unpack8(const Params& p, const EstimateTask& task, int64_t begin, int64_t d,
                      int64_t words, int8_t* to, __m256i& sum) {
    const int64_t left = p.D / 2 - d;
    __m256i r[8];
    for (int i = 0; i < 8; ++i) {
      const uint8_t* from = p.key + task.batch * p.key_stride[0] +
                            task.kv_head * p.key_stride[1] + (begin + i) * p.key_stride[2] + d;
      alignas(32) uint8_t bytes[32] = {};
      if (begin + i >= p.Tk || left < 32) {
        if (begin + i < p.Tk && left > 0) std::memcpy(bytes, from, left);
        from = bytes;
      }
      r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    transpose8(r);
    const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    const __m256i ones = _mm256_set1_epi16(1);
    const auto codes = [&](__m256i x) {
      return _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(x, nibble), eight), eight);
    };
    for (int i = 0; i < 8 && d / 4 + i < words / 2; ++i) {
      const __m256i low = codes(r[i]), high = codes(_mm256_srli_epi16(r[i], 4));
      int8_t* at = to + (d / 4 + i) * kSquare * 4;
      _mm256_store_si256(reinterpret_cast<__m256i*>(at), low);
      _mm256_store_si256(reinterpret_cast<__m256i*>(at + words / 2 * kSquare * 4), high);
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(eight, low),
                                             _mm256_maddubs_epi16(eight, high));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
  }

  // sums of pairs of channels; a function of its own, so that all sums stay in registers
  [[gnu::noinline]] static void multiply_some(const uint8_t* q, int64_t row_bytes,
                                              const int8_t* keys, int64_t words,
                                              __m256i (&out)[kRows][2]) {
    __m256i sum[kRows][2];
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t w = 0; w < words; ++w) {
      const auto* at = reinterpret_cast<const __m256i*>(keys + w * kSquare * 4);
      const __m256i k0 = _mm256_load_si256(at), k1 = _mm256_load_si256(at + 1);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = word(q + r * row_bytes + w * 4);
        sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(x, k0));
        sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(x, k1));
      }
    }
    std::memcpy(out, sum, sizeof sum);
  }

  // c = rows of codes plus 8 times 16 keys
  static void multiply(const uint8_t* q, int64_t row_bytes, const int8_t* keys, int64_t words,
                       __m256i (&c)[kRows][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (auto& row : c) row[0] = row[1] = _mm256_setzero_si256();
    for (int64_t w = 0; w < words; w += kFits) {
      __m256i sum[kRows][2];
      multiply_some(q + w * 4, row_bytes, keys + w * kSquare * 4, std::min(kFits, words - w), sum);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v)
          c[r][v] = _mm256_add_epi32(c[r][v], _mm256_madd_epi16(sum[r][v], ones));
    }
  }

  // rint of the bias in units of the two steps, NaN as large
  static __m256i steps_of(__m256 bias, __m256 inverse) {
    const __m256 limit = _mm256_set1_ps(kBiasLimit);
    __m256 t = _mm256_min_ps(_mm256_mul_ps(bias, inverse), limit);
    t = _mm256_max_ps(t, _mm256_set1_ps(-kBiasLimit));
    return _mm256_cvtps_epi32(t);
  }

  // whether a row of c, with the keys' bias, is above its bar; the keys from `key` on
  static bool exceeds(const UnitRows& rows, const EstimateScratch& s, int place, int key,
                      const __m256i (&c)[kRows][2]) {
    const __m256 key_step = _mm256_load_ps(s.key_step + key);
    __m256 kept = _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int pair = 0; pair < kRows / 2; ++pair) {
      const __m256 inverse = _mm256_set1_ps(rows.inverse[place / 2 + pair]);
      const __m256 unit = _mm256_mul_ps(_mm256_set1_ps(rows.step[place / 2 + pair]), key_step);
      __m256i start[2];
      for (int v = 0; v < 2; ++v)
        start[v] = _mm256_add_epi32(
            steps_of(_mm256_load_ps(rows.bias + key + v * 8), inverse),
            _mm256_load_si256(reinterpret_cast<const __m256i*>(s.correction + key + v * 8)));
#pragma GCC unroll 2
      for (int r = 2 * pair; r < 2 * pair + 2; ++r) {
        const __m256i top = _mm256_max_epi32(_mm256_add_epi32(c[r][0], start[0]),
                                             _mm256_add_epi32(c[r][1], start[1]));
        const __m256 x = _mm256_mul_ps(unit, _mm256_cvtepi32_ps(top));
        // not less or equal: NaN is kept
        const __m256 bar = _mm256_set1_ps(rows.theta[place + r]);
        kept = _mm256_or_ps(kept, _mm256_cmp_ps(x, bar, _CMP_NLE_UQ));
      }
    }
    return _mm256_movemask_ps(kept) != 0;
  }
};

}  // namespace

const EstimateKernel kEstimateAvx2 = {scratch_bytes, run<MaddEngine>};

}  // namespace sparse_attn
#endif
