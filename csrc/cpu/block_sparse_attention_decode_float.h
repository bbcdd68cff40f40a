// Decoding in float32, for every dtype and any vector width.
#pragma once
#include "block_sparse_attention_decode.h"

namespace sparse_attn {
namespace {

// Vec::kWidth elements as float
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
  float x[Vec::kWidth];
  to_float(kType, p, x, Vec::kWidth);
  return Vec::load(x);
#endif
}

template <DType kType, int kRowCount>
class FloatMath {
 public:
  static constexpr int kRows = kRowCount;

  FloatMath(const Params& p, const DecodeScratch& s)
      : s_(s), D_(p.D), Dv_(p.Dv), q_stride_(round_up(p.D, 32)), out_stride_(round_up(p.Dv, 32)) {}

  void set_query(int r, const char* from) {
    float* q = s_.q + r * q_stride_;
    std::memset(q, 0, q_stride_ * sizeof(float));
    to_float(kType, from, q, D_);
  }

  void score(const Rows& keys, const Rows& next) {
    for (int k = 0; k < kGroupKeys; ++k) {
      for (int64_t b = 0; b < D_ * element_bytes(kType); b += 64) prefetch(next[k] + b);
      Vec sum[kRows];
      for (auto& s : sum) s = Vec::zero();
      for_row(keys[k], D_, [&](int64_t d, Vec x) {
        for (int r = 0; r < kRows; ++r)
          sum[r] = Vec::fma(x, Vec::load(s_.q + r * q_stride_ + d), sum[r]);
      });
      for (int r = 0; r < kRows; ++r) s_.scores[r * kGroupKeys + k] = sum_lanes(sum[r]);
    }
  }

  // four keys per pass over the output, which stays in the first-level cache
  void add(const Rows& values, const Rows& next) {
    for (int k = 0; k < kGroupKeys; k += 4) {
      for (int i = k; i < k + 4; ++i)
        for (int64_t b = 0; b < Dv_ * element_bytes(kType); b += 64) prefetch(next[i] + b);
      int64_t d = 0;
      Vec x[4];
      for (; d + Vec::kWidth <= Dv_; d += Vec::kWidth) {
        for (int i = 0; i < 4; ++i)
          x[i] = load_as_float<kType>(values[k + i] + d * element_bytes(kType));
        add_four(x, k, d);
      }
      if (d == Dv_) continue;
      for (int i = 0; i < 4; ++i) {
        float rest[Vec::kWidth] = {};
        to_float(kType, values[k + i] + d * element_bytes(kType), rest, Dv_ - d);
        x[i] = Vec::load(rest);
      }
      add_four(x, k, d);
    }
  }

  void rescale(int r, float factor) {
    float* out = s_.out + r * out_stride_;
    for (int64_t d = 0; d < out_stride_; d += Vec::kWidth)
      (Vec::load(out + d) * Vec::set(factor)).store(out + d);
  }

  void read_out(int r, float* to) const {
    std::memcpy(to, s_.out + r * out_stride_, Dv_ * sizeof(float));
  }

 private:
  // Calls use(element, elements as float) for each vector of a row of n elements.
  template <class Use>
  static void for_row(const char* at, int64_t n, Use use) {
    int64_t d = 0;
    for (; d + Vec::kWidth <= n; d += Vec::kWidth)
      use(d, load_as_float<kType>(at + d * element_bytes(kType)));
    if (d == n) return;
    float rest[Vec::kWidth] = {};
    to_float(kType, at + d * element_bytes(kType), rest, n - d);
    use(d, Vec::load(rest));
  }

  void add_four(const Vec (&x)[4], int k, int64_t d) {
    for (int r = 0; r < kRows; ++r) {
      float* out = s_.out + r * out_stride_ + d;
      Vec sum = Vec::load(out);
      for (int i = 0; i < 4; ++i)
        sum = Vec::fma(Vec::set(s_.scores[r * kGroupKeys + k + i]), x[i], sum);
      sum.store(out);
    }
  }

  const DecodeScratch& s_;
  const int64_t D_, Dv_, q_stride_, out_stride_;
};

template <DType kType>
void decode_as_float(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                     void* scratch, float* partial) {
  switch (tile.rows()) {
    case 1: return decode<FloatMath<kType, 1>>(p, tile, groups, n, scratch, partial);
    case 2: return decode<FloatMath<kType, 2>>(p, tile, groups, n, scratch, partial);
    case 3: return decode<FloatMath<kType, 3>>(p, tile, groups, n, scratch, partial);
    default: return decode<FloatMath<kType, 4>>(p, tile, groups, n, scratch, partial);
  }
}

void decode_tile(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                 const void*, void* scratch, float* partial) {
  switch (p.dtype) {
    case DType::f32: return decode_as_float<DType::f32>(p, tile, groups, n, scratch, partial);
    case DType::f16: return decode_as_float<DType::f16>(p, tile, groups, n, scratch, partial);
    case DType::bf16: return decode_as_float<DType::bf16>(p, tile, groups, n, scratch, partial);
  }
}

}  // namespace
}  // namespace sparse_attn
