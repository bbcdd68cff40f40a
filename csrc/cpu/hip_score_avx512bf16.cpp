// Scores of gathered bfloat16 keys, read where they lie: products of pairs, summed in float32.
#if defined(__x86_64__)
#include "avx512_util.h"
#include "hip_score_float.h"

namespace sparse_attn {
namespace {

struct Add {
  static __m512 join(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};
struct Max {
  static __m512 join(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

// Lane i of the result joins the lanes of r[i].
template <class How>
inline __m512 reduce16(__m512 r[16]) {
  const auto lanes32 = [](__m512 a, __m512 b) {
    return How::join(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const auto lanes64 = [](__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return How::join(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                     _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const auto lanes128 = [](__m512 a, __m512 b) {
    return How::join(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 s[4];
  for (int i = 0; i < 4; ++i)
    s[i] = lanes64(lanes32(r[4 * i], r[4 * i + 1]), lanes32(r[4 * i + 2], r[4 * i + 3]));
  return lanes128(lanes128(s[0], s[1]), lanes128(s[2], s[3]));
}

inline const uint16_t* halves(const char* row) { return reinterpret_cast<const uint16_t*>(row); }

// acc[k][v] = pairs of row k times pairs of the voters in the lanes of v
template <int kKeys, int kVectors>
inline void multiply_pairs(const uint32_t* q, int64_t vector_stride, int64_t pairs,
                           const char* const* rows, __m512 (&acc)[kKeys][kVectors]) {
  for (auto& a : acc)
    for (auto& x : a) x = _mm512_setzero_ps();
  for (int64_t d = 0; d < pairs; ++d) {
    __m512bh lanes[kVectors];
    for (int v = 0; v < kVectors; ++v)
      lanes[v] = (__m512bh)_mm512_load_si512(q + v * vector_stride + d * 16);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      int32_t pair;
      std::memcpy(&pair, rows[k] + d * 4, sizeof pair);
      const auto x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[k][v] = _mm512_dpbf16_ps(acc[k][v], x, lanes[v]);
    }
  }
}

struct PairScore {
  static constexpr int kTokens = 16;    // whose maxima are taken together
  static constexpr int64_t kFew = 4;    // voters that would leave most lanes empty

  static int64_t vectors(int64_t voters) { return (voters + 15) / 16; }

  static int64_t scratch_bytes(const HipParams& p, int64_t voters) {
    const int64_t lanes = vectors(voters) * 16;
    return lanes * round_up(p.D, 32) * static_cast<int64_t>(sizeof(uint16_t));
  }

  static void pack(const HipParams& p, const HipVoters& voters, void* scratch) {
    const auto voter = [&](int64_t r) {
      // without a sign all products are 0
      return p.sign == 0 ? nullptr : halves(voters.row[r < voters.count ? r : voters.count - 1]);
    };
    if (voters.count > kFew) {
      pack_lanes(voter, vectors(voters.count) * 16, p.D, p.sign < 0,
                 static_cast<uint32_t*>(scratch));
      return;
    }
    auto* to = static_cast<uint16_t*>(scratch);
    const __m512i sign = _mm512_set1_epi16(p.sign < 0 ? static_cast<short>(0x8000) : 0);
    for (int64_t r = 0; r < kFew; ++r)
      for (int64_t d = 0; d < p.D; d += 32, to += 32)
        _mm512_store_si512(to, voter(r) == nullptr
                                   ? _mm512_setzero_si512()
                                   : _mm512_xor_si512(sign, _mm512_maskz_loadu_epi16(
                                                                first_halves(p.D - d),
                                                                voter(r) + d)));
  }

  static void score(const HipParams& p, const HipVoters& voters, const HipKeys& keys,
                    const int32_t* tokens, int64_t n, float* scores, void* scratch) {
    const char* rows[kTokens];
    for (int64_t from = 0; from < n; from += kTokens) {
      const int64_t count = n - from < kTokens ? n - from : kTokens;
      int32_t padded[kTokens];
      for (int64_t k = 0; k < kTokens; ++k) {
        padded[k] = tokens[from + (k < count ? k : count - 1)];
        rows[k] = row_of(keys, padded[k]);
      }
      prefetch(p, keys, tokens + from + count, n - from - count);
      const __m512 best = voters.count == 1   ? few<1>(p, voters, padded, rows, scratch)
                          : voters.count == 2 ? few<2>(p, voters, padded, rows, scratch)
                          : voters.count <= kFew ? few<4>(p, voters, padded, rows, scratch)
                                                 : many(p, voters, padded, rows, scratch);
      _mm512_mask_storeu_ps(scores + from, first_lanes(count), best);
    }
  }

 private:
  static void prefetch(const HipParams& p, const HipKeys& keys, const int32_t* tokens, int64_t n) {
    for (int64_t k = 0; k < n && k < kTokens; ++k) {
      const char* row = row_of(keys, tokens[k]);
      for (int64_t at = 0; at < p.D * 2; at += 64) _mm_prefetch(row + at, _MM_HINT_T0);
    }
  }

  static __m512 counted(__m512 x, const int32_t* limits, int32_t token, int32_t lowest) {
    if (token <= lowest) return x;
    const __mmask16 counts =
        _mm512_cmpge_epi32_mask(_mm512_loadu_si512(limits), _mm512_set1_epi32(token));
    return _mm512_mask_blend_ps(counts, _mm512_set1_ps(-INFINITY), x);
  }

  // voters in lanes, a key at a time
  template <int kVectors>
  static void add_lanes(const HipParams& p, const HipVoters& voters, const int32_t* tokens,
                        const char* const* rows, const uint32_t* q, int64_t vector,
                        __m512 best[kTokens]) {
    constexpr int kKeys = 8;
    const int64_t stride = round_up(p.D, 32) / 2 * 16;
    for (int k = 0; k < kTokens; k += kKeys) {
      __m512 acc[kKeys][kVectors];
      multiply_pairs<kKeys, kVectors>(q + vector * stride, stride, p.D / 2, rows + k, acc);
      for (int i = 0; i < kKeys; ++i)
        for (int v = 0; v < kVectors; ++v)  // in this order NaN does not count
          best[k + i] = _mm512_max_ps(counted(acc[i][v], voters.limit + (vector + v) * 16,
                                              tokens[k + i], voters.lowest_limit),
                                      best[k + i]);
    }
  }

  static __m512 many(const HipParams& p, const HipVoters& voters, const int32_t* tokens,
                     const char* const* rows, const void* scratch) {
    const auto* q = static_cast<const uint32_t*>(scratch);
    __m512 best[kTokens];
    for (auto& x : best) x = _mm512_set1_ps(-INFINITY);
    int64_t vector = 0;
    for (; vector + 2 <= vectors(voters.count); vector += 2)
      add_lanes<2>(p, voters, tokens, rows, q, vector, best);
    if (vector < vectors(voters.count)) add_lanes<1>(p, voters, tokens, rows, q, vector, best);
    return reduce16<Max>(best);
  }

  // dimensions in lanes: products of 16 / kRows keys with kRows voters at a time
  template <int kRows>
  static __m512 few(const HipParams& p, const HipVoters& voters, const int32_t* tokens,
                    const char* const* rows, const void* scratch) {
    constexpr int kKeys = 16 / kRows;
    alignas(64) float best[kTokens];
    const int64_t stride = round_up(p.D, 32);
    const auto* q = static_cast<const uint16_t*>(scratch);
    for (int k = 0; k < kTokens; k += kKeys) {
      __m512 acc[16];
      for (auto& x : acc) x = _mm512_setzero_ps();
      for (int64_t d = 0; d < p.D; d += 32) {
        const __mmask32 mask = first_halves(p.D - d);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          const auto x = (__m512bh)_mm512_maskz_loadu_epi16(mask, halves(rows[k + i]) + d);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r)
            acc[i * kRows + r] = _mm512_dpbf16_ps(
                acc[i * kRows + r], x, (__m512bh)_mm512_load_si512(q + r * stride + d));
        }
      }
      __m512 sums = reduce16<Add>(acc);
      alignas(64) int32_t token[16], limit[16];
      for (int i = 0; i < 16; ++i) {
        token[i] = tokens[k + i / kRows];
        limit[i] = voters.limit[i % kRows];
      }
      const __mmask16 counts =
          _mm512_cmpge_epi32_mask(_mm512_load_si512(limit), _mm512_load_si512(token));
      const __m512 none = _mm512_set1_ps(-INFINITY);
      sums = _mm512_max_ps(_mm512_mask_blend_ps(counts, none, sums), none);
      if (kRows >= 2) sums = _mm512_max_ps(sums, _mm512_permute_ps(sums, 0xb1));
      if (kRows == 4) sums = _mm512_max_ps(sums, _mm512_permute_ps(sums, 0x4e));
      constexpr __mmask16 kFirst = kRows == 1 ? 0xffff : kRows == 2 ? 0x5555 : 0x1111;
      _mm512_mask_storeu_ps(best + k, first_lanes(kKeys),
                            _mm512_maskz_compress_ps(kFirst, sums));
    }
    return _mm512_load_ps(best);
  }
};

}  // namespace

const HipScoreKernel kHipScoreAvx512Bf16 = {
    [](const HipParams& p, int64_t voters) {
      return PairScore::scratch_bytes(p, voters > PairScore::kFew ? voters : 16);
    },
    PairScore::pack, PairScore::score, keep_best};

}  // namespace sparse_attn
#endif
