// The decode kernel: few query rows against many keys, bound by memory. Keys and values are read
// once, where they lie; rows of a GQA group share what was read.
#pragma once
#include "block_sparse_attention_float.h"

namespace sparse_attn {
namespace {

constexpr int kDecodeRowsMax = 4;

struct DecodeScratch {
  float* q;       // [rows][D rounded up to the width]
  float* out;     // [rows][Dv rounded up]
  float* scores;  // [rows][32]
  float* max;     // [rows]
  float* sum;     // [rows]

  static int64_t layout(const Params& p, char* base, DecodeScratch* s) {
    char* at = base;
    const auto take = [&at](auto*& pointer, int64_t elements) {
      pointer = reinterpret_cast<decltype(+pointer)>(at);
      at += round_up(elements * 4, 64);
    };
    DecodeScratch t;
    take(t.q, kDecodeRowsMax * round_up(p.D, kWidth));
    take(t.out, kDecodeRowsMax * round_up(p.Dv, kWidth));
    take(t.scores, kDecodeRowsMax * kGroupKeys);
    take(t.max, kDecodeRowsMax);
    take(t.sum, kDecodeRowsMax);
    if (s != nullptr) *s = t;
    return at - base;
  }
};

int64_t decode_scratch_bytes(const Params& p) { return DecodeScratch::layout(p, nullptr, nullptr); }

// kWidth elements as float
template <DType kType>
inline Vec load_as_float(const char* p) {
  if constexpr (kType == DType::f32) return Vec::load(reinterpret_cast<const float*>(p));
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (kType == DType::f16) return {_mm512_cvtph_ps(h)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (kType == DType::f16) return {_mm256_cvtph_ps(h)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
#else
  float x[kWidth];
  to_float(kType, p, x, kWidth);
  return Vec::load(x);
#endif
}

inline float sum_lanes(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x.v);
#else
  float lanes[kWidth], sum = 0;
  x.store(lanes);
  for (int i = 0; i < kWidth; ++i) sum += lanes[i];
  return sum;
#endif
}

template <DType kType, int kRows>
class Decode {
 public:
  Decode(const Params& p, const QueryTile& tile, void* scratch)
      : p_(p), tile_(tile), D_(round_up(p.D, kWidth)), Dv_(round_up(p.Dv, kWidth)) {
    DecodeScratch::layout(p, static_cast<char*>(scratch), &s_);
    const float to_log2 = p.scale * 1.44269504088896341f;
    for (int r = 0; r < kRows; ++r) {
      float* q = s_.q + r * D_;
      for (int64_t d = p.D; d < D_; ++d) q[d] = 0;
      to_float(kType, element(kType, p.query, p.query_stride, tile.batch, head_of(r), query_of(r)),
               q, p.D);
      for (int64_t d = 0; d < p.D; ++d) q[d] *= to_log2;
      std::memset(s_.out + r * Dv_, 0, Dv_ * sizeof(float));
      s_.max[r] = kNoKey;
      s_.sum[r] = 0;
    }
  }

  void run(const KeyGroup* groups, int64_t n) {
    for (int64_t g = 0; g < n; ++g) {
      const KeyGroup& next = groups[g + 1 < n ? g + 1 : g];
      for (int k = 0; k < kGroupKeys; ++k) {
        prefetch(element(kType, p_.key, p_.key_stride, tile_.batch, tile_.kv_head, token(next, k)),
                 p_.D);
        score(groups[g], k);
      }
      for (int r = 0; r < kRows; ++r) exponentiate(groups[g], r);
      for (int k = 0; k < kGroupKeys; k += 4) {
        for (int i = k; i < k + 4; ++i)
          prefetch(element(kType, p_.value, p_.value_stride, tile_.batch, tile_.kv_head,
                           token(next, i)),
                   p_.Dv);
        accumulate(groups[g], k);
      }
    }
  }

  void finish(float* partial) {
    for (int r = 0; r < kRows; ++r) {
      const float* out = s_.out + r * Dv_;
      const float natural = s_.max[r] * 0.69314718055994531f, sum = s_.sum[r];
      if (partial != nullptr) {
        float* to = partial + r * (p_.Dv + 2);
        std::memcpy(to, out, p_.Dv * sizeof(float));
        to[p_.Dv] = sum == 0 ? kNoKey : natural;
        to[p_.Dv + 1] = sum;
        continue;
      }
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      const int64_t at = tile_.batch * p_.out_stride[0] + head_of(r) * p_.out_stride[1] +
                         query_of(r) * p_.out_stride[2];
      for (int64_t d = 0; d < p_.Dv; ++d) from_float(kType, out[d] * inverse, p_.out, at + d);
      p_.lse[(tile_.batch * p_.Hq + head_of(r)) * p_.Tq + query_of(r)] =
          sum == 0 ? -INFINITY : natural + std::log(sum);
    }
  }

 private:
  int64_t head_of(int r) const { return tile_.head + r / tile_.queries; }
  int64_t query_of(int r) const { return tile_.query + r % tile_.queries; }

  static int64_t token(const KeyGroup& g, int k) {
    return g.tokens == nullptr ? g.first + k : g.tokens[k];
  }

  // a row of the next group at a time: more would wait for free line buffers
  static void prefetch(const char* row, int64_t n) {
    for (int64_t b = 0; b < n * element_bytes(kType); b += 64) __builtin_prefetch(row + b);
  }

  // Calls use(vector index, elements as float) for each vector of a row of n elements.
  template <class Use>
  static void for_row(const char* at, int64_t n, Use use) {
    int64_t d = 0;
    for (; d + kWidth <= n; d += kWidth)
      use(d, load_as_float<kType>(at + d * element_bytes(kType)));
    if (d == n) return;
    float rest[kWidth] = {};
    to_float(kType, at + d * element_bytes(kType), rest, n - d);
    use(d, Vec::load(rest));
  }

  void score(const KeyGroup& g, int k) {
    Vec sum[kRows];
    for (auto& s : sum) s = Vec::zero();
    for_row(element(kType, p_.key, p_.key_stride, tile_.batch, tile_.kv_head, token(g, k)), p_.D,
            [&](int64_t d, Vec x) {
              for (int r = 0; r < kRows; ++r)
                sum[r] = Vec::fma(x, Vec::load(s_.q + r * D_ + d), sum[r]);
            });
    for (int r = 0; r < kRows; ++r) s_.scores[r * kGroupKeys + k] = sum_lanes(sum[r]);
  }

  void exponentiate(const KeyGroup& g, int r) {
    const int64_t position = p_.Tk - p_.Tq + query_of(r);
    float* scores = s_.scores + r * kGroupKeys;
    float top = s_.max[r];
    for (int k = 0; k < kGroupKeys; ++k) {
      const int64_t j = token(g, k);
      bool seen = g.everyone >> k & 1;
      seen |= (g.windowed >> k & 1) && j > position - p_.window && j <= position;
      if (!seen || (p_.causal && j > position)) scores[k] = -INFINITY;
      if (scores[k] > top) top = scores[k];
    }
    const float shrink = std::exp2(s_.max[r] - top);
    s_.max[r] = top;
    if (shrink != 1) {
      s_.sum[r] *= shrink;
      for (int64_t d = 0; d < Dv_; d += kWidth)
        (Vec::load(s_.out + r * Dv_ + d) * Vec::set(shrink)).store(s_.out + r * Dv_ + d);
    }
    Vec sum = Vec::zero();
    for (int k = 0; k < kGroupKeys; k += kWidth) {
      const Vec x = Vec::load(scores + k);
      const Vec e = Vec::select(Vec::greater(x, Vec::set(-INFINITY)), exp2(x - Vec::set(top)),
                                Vec::zero());
      e.store(scores + k);
      sum = sum + e;
    }
    s_.sum[r] += sum_lanes(sum);
  }

  // four keys per pass over the output, which stays in the first-level cache
  void accumulate(const KeyGroup& g, int k) {
    const char* row[4];
    for (int i = 0; i < 4; ++i)
      row[i] = element(kType, p_.value, p_.value_stride, tile_.batch, tile_.kv_head,
                       token(g, k + i));
    int64_t d = 0;
    const auto add = [&](const Vec (&x)[4]) {
      for (int r = 0; r < kRows; ++r) {
        float* out = s_.out + r * Dv_ + d;
        Vec sum = Vec::load(out);
        for (int i = 0; i < 4; ++i)
          sum = Vec::fma(Vec::set(s_.scores[r * kGroupKeys + k + i]), x[i], sum);
        sum.store(out);
      }
    };
    Vec x[4];
    for (; d + kWidth <= p_.Dv; d += kWidth) {
      for (int i = 0; i < 4; ++i) x[i] = load_as_float<kType>(row[i] + d * element_bytes(kType));
      add(x);
    }
    if (d == p_.Dv) return;
    for (int i = 0; i < 4; ++i) {
      float rest[kWidth] = {};
      to_float(kType, row[i] + d * element_bytes(kType), rest, p_.Dv - d);
      x[i] = Vec::load(rest);
    }
    add(x);
  }

  const Params& p_;
  const QueryTile& tile_;
  const int64_t D_, Dv_;
  DecodeScratch s_;
};

template <DType kType, int kRows>
void decode_rows(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                 void* scratch, float* partial) {
  Decode<kType, kRows> d(p, tile, scratch);
  d.run(groups, n);
  d.finish(partial);
}

template <DType kType>
void decode_type(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                 void* scratch, float* partial) {
  switch (tile.rows()) {
    case 1: return decode_rows<kType, 1>(p, tile, groups, n, scratch, partial);
    case 2: return decode_rows<kType, 2>(p, tile, groups, n, scratch, partial);
    case 3: return decode_rows<kType, 3>(p, tile, groups, n, scratch, partial);
    default: return decode_rows<kType, 4>(p, tile, groups, n, scratch, partial);
  }
}

void decode_tile(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                 const void*, void* scratch, float* partial) {
  switch (p.dtype) {
    case DType::f32: return decode_type<DType::f32>(p, tile, groups, n, scratch, partial);
    case DType::f16: return decode_type<DType::f16>(p, tile, groups, n, scratch, partial);
    case DType::bf16: return decode_type<DType::bf16>(p, tile, groups, n, scratch, partial);
  }
}

}  // namespace
}  // namespace sparse_attn
