// Scores of clusters and their softmax, for any vector width. Multiplies with what decoding
// multiplies keys with: centroids are keys.
#pragma once
#include "block_sparse_attention_decode.h"
#include "squeezed_lookup.h"

namespace sparse_attn {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

inline Params as_keys(const SqueezedLookupParams& p) {
  Params keys{};
  keys.D = p.D, keys.dtype = p.dtype;
  return keys;
}

int64_t lookup_scratch_bytes(const SqueezedLookupParams& p) {
  return decode_scratch_bytes(as_keys(p));
}

template <class Math>
void score_with(const SqueezedLookupParams& p, const ScoreTask& t, void* scratch,
                float* const* logits) {
  const Params keys = as_keys(p);
  DecodeScratch s;
  DecodeScratch::layout(keys, static_cast<char*>(scratch), &s);
  Math math(keys, s);
  for (int r = 0; r < Math::kRows; ++r) math.set_query(r, t.rows[r]);
  Rows rows[2];
  const auto find = [&](int64_t first, Rows& to) {
    for (int k = 0; k < kGroupKeys; ++k) {
      const int64_t j = first + k < t.end ? first + k : t.end - 1;
      to[k] = t.centroids + j * t.stride;
    }
  };
  const auto following = [&](int64_t j) {
    while (j < t.end && t.needed != nullptr && !t.needed[j / kGroupKeys]) j += kGroupKeys;
    return j;
  };
  int64_t j = following(t.begin);
  if (j >= t.end) return;
  find(j, rows[0]);
  for (int now = 0; j < t.end; now ^= 1) {
    const int64_t next = following(j + kGroupKeys);
    find(next < t.end ? next : j, rows[now ^ 1]);
    math.score(rows[now], rows[now ^ 1]);
    const int64_t n = t.end - j < kGroupKeys ? t.end - j : kGroupKeys;
    for (int r = 0; r < Math::kRows; ++r)
      for (int64_t k = 0; k < n; ++k) logits[r][j + k] = p.scale * s.scores[r * kGroupKeys + k];
    j = next;
  }
}

float log_sum(float* logits, const float* weights, int64_t n) {
  constexpr int kWidth = Vec::kWidth;
  const Vec none = Vec::set(-INFINITY);
  float rest_logits[kWidth], rest_weights[kWidth];
  const int64_t whole = n / kWidth * kWidth;
  for (int i = 0; i < kWidth; ++i) {
    rest_weights[i] = whole + i < n ? weights[whole + i] : -INFINITY;
    rest_logits[i] = whole + i < n ? logits[whole + i] : 0;
  }
  Vec top = none;
  const auto mask = [&](float* x, const float* w) {
    const Vec weight = Vec::load(w);
    const Vec kept = Vec::select(Vec::differ(weight, none), Vec::load(x), none);
    kept.store(x);
    top = Vec::max(kept + weight, top);
  };
  for (int64_t j = 0; j < whole; j += kWidth) mask(logits + j, weights + j);
  mask(rest_logits, rest_weights);
  for (int64_t j = whole; j < n; ++j) logits[j] = rest_logits[j - whole];
  const float peak = max_lanes(top);
  if (peak == -INFINITY) return peak;
  Vec sum = Vec::zero();
  const auto add = [&](const float* x, const float* w) {
    const Vec y = Vec::load(x) + Vec::load(w) - Vec::set(peak);
    sum = sum + exp2(y * Vec::set(kLog2E));
  };
  for (int64_t j = 0; j < whole; j += kWidth) add(logits + j, weights + j);
  add(rest_logits, rest_weights);
  return peak + std::log(sum_lanes(sum));
}

void add_shares(const float* logits, int64_t n, float log_sum, float* total) {
  constexpr int kWidth = Vec::kWidth;
  const Vec shift = Vec::set(log_sum), factor = Vec::set(kLog2E);
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth)
    (Vec::load(total + j) + exp2((Vec::load(logits + j) - shift) * factor)).store(total + j);
  float rest[kWidth] = {};
  for (int64_t i = j; i < n; ++i) rest[i - j] = logits[i];
  exp2((Vec::load(rest) - shift) * factor).store(rest);
  for (int64_t i = j; i < n; ++i) total[i] += rest[i - j];
}

}  // namespace
}  // namespace sparse_attn
