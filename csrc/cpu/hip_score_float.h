// Scores of gathered keys in float32, and the choice of the best, for every instruction set.
#pragma once
#include "hip_score.h"
#include "lanes.h"

namespace sparse_attn {
namespace {

// Order of the values as integers; -0 is 0.
inline int32_t rank_of(float x) {
  const auto bits = static_cast<int32_t>(float_to_bits(x + 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Halves the range of ranks in which the bound lies: no sort, and the compiler counts in vectors.
void keep_best(const float* values, int64_t n, int64_t keep, int32_t* ranks, int32_t* places) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t r = ranks[i] = rank_of(values[i]);
    low = r < low ? r : low;
    high = r > high ? r : high;
  }
  // invariant: at least `keep` ranks are >= low, fewer are >= high + 1
  int64_t at_low = n;
  while (low < high && at_low > keep) {
    const auto middle = static_cast<int32_t>((int64_t{low} + high + 1) >> 1);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += ranks[i] >= middle;
    if (count >= keep) {
      low = middle;
      at_low = count;
    } else {
      high = middle - 1;
    }
  }
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += ranks[i] > low;
  int64_t equal = keep - above, at = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool ties = ranks[i] == low;
    places[at] = static_cast<int32_t>(i);
    at += ranks[i] > low || (ties && equal > 0);
    equal -= ties;
  }
}

inline float max_of(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x.v);
#elif defined(__AVX2__)
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#else
  float best = x.v[0];
  for (int i = 1; i < kWidth; ++i) best = x.v[i] > best ? x.v[i] : best;
  return best;
#endif
}

// Voters stand in SIMD lanes; keys are brought to float 32 at a time.
struct FloatScore {
  static constexpr int kTile = 32;

  static int64_t blocks(int64_t voters) { return (voters + kLanes - 1) / kLanes; }

  static int64_t scratch_bytes(const HipParams& p, int64_t voters) {
    return (blocks(voters) * kLanes * p.D + kTile * (p.D + kLanes)) *
           static_cast<int64_t>(sizeof(float));
  }

  // [blocks][D][kLanes]; lanes beyond the voters repeat the last
  static void pack(const HipParams& p, const HipVoters& voters, void* scratch) {
    auto* const q = static_cast<float*>(scratch);
    float* const row = q + blocks(voters.count) * kLanes * p.D;
    for (int64_t lane = 0; lane < blocks(voters.count) * kLanes; ++lane) {
      const int64_t r = lane < voters.count ? lane : voters.count - 1;
      to_float(p.dtype, voters.row[r], row, p.D);
      float* const to = q + lane / kLanes * kLanes * p.D + lane % kLanes;
      for (int64_t d = 0; d < p.D; ++d) to[d * kLanes] = row[d] * p.sign;
    }
  }

  static void score(const HipParams& p, const HipVoters& voters, const HipKeys& keys,
                    const int32_t* tokens, int64_t n, float* scores, void* scratch) {
    auto* const q = static_cast<float*>(scratch);
    float* const rows = q + blocks(voters.count) * kLanes * p.D;
    float* const dots = rows + kTile * p.D;
    for (int64_t from = 0; from < n; from += kTile) {
      const int count = static_cast<int>(n - from < kTile ? n - from : kTile);
      for (int k = 0; k < count; ++k)
        to_float(p.dtype, row_of(keys, tokens[from + k]), rows + k * p.D, p.D);
      Vec best[kTile];
      for (int k = 0; k < count; ++k) best[k] = Vec::set(-INFINITY);
      for (int64_t block = 0; block < blocks(voters.count); ++block) {
        dot_rows(rows, p.D, count, p.D, q + block * kLanes * p.D, dots);
        for (int k = 0; k < count; ++k) {
          const int32_t token = tokens[from + k];
          for (int v = 0; v < 2; ++v) {
            Vec x = Vec::load(dots + k * kLanes + v * kWidth);
            if (token > voters.lowest_limit)
              x = Vec::select(
                  Vec::within(voters.limit + block * kLanes + v * kWidth, token, INT32_MAX), x,
                  Vec::set(-INFINITY));
            best[k] = Vec::max(x, best[k]);  // in this order NaN does not count
          }
        }
      }
      for (int k = 0; k < count; ++k) scores[from + k] = max_of(best[k]);
    }
  }
};

constexpr HipScoreKernel float_score_kernel() {
  return {FloatScore::scratch_bytes, FloatScore::pack, FloatScore::score, keep_best};
}

}  // namespace
}  // namespace sparse_attn
