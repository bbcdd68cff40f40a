// One float vector type per instruction set, chosen by the flags of the unit that includes this.
// Internal linkage throughout: the same names mean different code in different units.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/params.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparse_attn {
namespace {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  using Mask = __mmask16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static Mask differ(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ); }
  static Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
  static bool any(Mask m) { return m != 0; }
  // lanes whose position p satisfies low <= p <= high
  static Mask within(const int32_t* position, int32_t low, int32_t high) {
    const __m512i p = _mm512_loadu_si512(position);
    return _mm512_cmpge_epi32_mask(p, _mm512_set1_epi32(low)) &
           _mm512_cmple_epi32_mask(p, _mm512_set1_epi32(high));
  }
  static Vec floor(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF)}; }
  static Vec scale_by_power(Vec y, Vec n) { return {_mm512_scalef_ps(y.v, n.v)}; }
};

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  using Mask = __m256;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  static Mask differ(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ); }
  static Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m)}; }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static Mask within(const int32_t* position, int32_t low, int32_t high) {
    const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(position));
    const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), p),
                                            _mm256_cmpgt_epi32(p, _mm256_set1_epi32(high)));
    return _mm256_castsi256_ps(_mm256_xor_si256(outside, _mm256_set1_epi32(-1)));
  }
  static Vec floor(Vec a) { return {_mm256_floor_ps(a.v)}; }
  static Vec scale_by_power(Vec y, Vec n) {
    // n <= 0 here; below -126 the power is no longer a normal float
    const __m256 kept = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m256i bits =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_and_ps(_mm256_mul_ps(y.v, _mm256_castsi256_ps(bits)), kept)};
  }
};

#else

struct Vec {
  static constexpr int kWidth = 8;
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Mask __attribute__((vector_size(32)));
  Floats v;

  static Vec zero() { return {Floats{}}; }
  static Vec set(float x) { return {Floats{} + x}; }
  static Vec load(const float* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec max(Vec a, Vec b) { return select(a.v > b.v, a, b); }
  static Mask greater(Vec a, Vec b) { return a.v > b.v; }
  static Mask differ(Vec a, Vec b) { return a.v != b.v; }
  static Vec select(Mask m, Vec yes, Vec no) {
    const Mask y = (Mask)yes.v, n = (Mask)no.v;
    return {(Floats)((y & m) | (n & ~m))};
  }
  static bool any(Mask m) {
    int32_t r = 0;
    for (int i = 0; i < kWidth; ++i) r |= m[i];
    return r != 0;
  }
  static Mask within(const int32_t* position, int32_t low, int32_t high) {
    Mask p;
    std::memcpy(&p, position, sizeof p);
    return (p >= low) & (p <= high);
  }
  static Vec floor(Vec a) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = std::floor(a.v[i]);
    return r;
  }
  static Vec scale_by_power(Vec y, Vec n) {
    const Mask bits = (__builtin_convertvector(n.v, Mask) + 127) << 23;
    return {(Floats)((Mask)(y.v * (Floats)bits) & ~(n.v < -126.0f))};
  }
};

#endif

// 2^t for t <= 0 (and small positive t) to about one unit in the last place; 0 below 2^-126
inline Vec exp2(Vec t) {
  t = Vec::max(Vec::set(-1000.0f), t);  // in this order NaN stays NaN
  const Vec n = Vec::floor(t);
  const Vec f = t - n;
  Vec y = Vec::set(0.00021702255200821202f);
  y = Vec::fma(y, f, Vec::set(0.0012439687903116317f));
  y = Vec::fma(y, f, Vec::set(0.009678840987840184f));
  y = Vec::fma(y, f, Vec::set(0.05548334198870952f));
  y = Vec::fma(y, f, Vec::set(0.2402298362730337f));
  y = Vec::fma(y, f, Vec::set(0.693146983840694f));
  y = Vec::fma(y, f, Vec::set(1.0000000018557988f));
  return Vec::scale_by_power(y, n);
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  // shifted into place the exponent is short by 112; subnormals come right through the product
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // below the normal halves: adding 0.5 rounds at bit 2^-24
    const float rounded = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(rounded) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

// Converts n consecutive elements to float.
inline void to_float(DType dtype, const void* from, float* to, int64_t n) {
  int64_t i = 0;
  const auto* h = static_cast<const uint16_t*>(from);
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, n * sizeof(float)); return;
    case DType::bf16:
      for (; i < n; ++i) to[i] = bf16_to_float(h[i]);
      return;
    case DType::f16:
#if defined(__AVX512F__)
      for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(h + i))));
#elif defined(__F16C__)
      for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + i))));
#endif
      for (; i < n; ++i) to[i] = half_to_float(h[i]);
      return;
  }
}

inline void from_float(DType dtype, float x, void* to, int64_t at) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(to)[at] = x; return;
    case DType::f16: static_cast<uint16_t*>(to)[at] = float_to_half(x); return;
    case DType::bf16: static_cast<uint16_t*>(to)[at] = float_to_bf16(x); return;
  }
}

}  // namespace
}  // namespace sparse_attn
