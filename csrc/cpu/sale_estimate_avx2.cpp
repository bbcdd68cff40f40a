// SALE's selection pass on AVX2: vpmaddubsw, whose sums of 4-bit products fit 16 bits for long.
#if defined(__x86_64__)
#include <immintrin.h>

#include "sale_estimate_lanes.h"

namespace sparse_attn {
namespace {

struct MaddProduct {
  static constexpr int64_t kFits = 128;  // words: 128 * 2 * 15 * 7 < 2^15

  static void run(const uint8_t* q, int64_t row_bytes, const int8_t* keys, int64_t words,
                  int32_t (&c)[kRows][kSquare]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int k = 0; k < kSquare; k += 16) {
      __m256i wide[kRows][2] = {};
      for (int64_t begin = 0; begin < words; begin += kFits) {
        const int64_t end = begin + kFits < words ? begin + kFits : words;
        __m256i sum[kRows][2] = {};
        for (int64_t w = begin; w < end; ++w) {
          const auto* at = reinterpret_cast<const __m256i*>(keys + (w * kSquare + k) * 4);
          const __m256i k0 = _mm256_load_si256(at), k1 = _mm256_load_si256(at + 1);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            int32_t word;
            std::memcpy(&word, q + r * row_bytes + w * 4, sizeof word);
            const __m256i x = _mm256_set1_epi32(word);
            sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(x, k0));
            sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(x, k1));
          }
        }
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < 2; ++v)
            wide[r][v] = _mm256_add_epi32(wide[r][v], _mm256_madd_epi16(sum[r][v], ones));
      }
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(c[r] + k + v * 8), wide[r][v]);
    }
  }
};

}  // namespace

const EstimateKernel kEstimateAvx2 = {scratch_bytes, run<LanesEngine<MaddProduct>>};

}  // namespace sparse_attn
#endif
