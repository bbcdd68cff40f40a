// SALE's 4-bit codes, for any vector width: sparse_attn/reference/sale_quantize.py says what.
#pragma once
#include "block_sparse_attention.h"
#include "sale_quantize.h"
#include "simd.h"

namespace sparse_attn {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;  // bits of |c| from here on are no number
constexpr int kMaxBlock = 64;

inline const char* token_row(const SaleQuantizeParams& p, int64_t batch, int64_t head, int64_t t) {
  return element(p.dtype, p.x, p.x_stride, batch, head, t);
}

void sum(const SaleQuantizeParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end,
         float* sums) {
  constexpr int kPart = 64;
  float part[kPart];
  std::memset(sums, 0, p.D * sizeof(float));
  for (int64_t t = begin; t < end; ++t) {
    const char* row = token_row(p, batch, head, t);
    for (int64_t d = 0; d < p.D; d += kPart) {
      const int64_t n = p.D - d < kPart ? p.D - d : kPart;
      to_float(p.dtype, row + d * element_bytes(p.dtype), part, n);
      for (int64_t i = 0; i < n; ++i) sums[d + i] += part[i];
    }
  }
}

// rint(x * inverse) in 4 bits; no sum follows the product, so nothing can fuse them
inline int32_t code(float x, float inverse) {
  return inverse == 0 ? 0 : static_cast<int32_t>(std::nearbyintf(x * inverse)) & 15;
}

// Two channels a byte. An inverse of 0 stands for a group without codes.
inline void pack_row(const float* c, int64_t half, float inverse, uint8_t* out) {
  int64_t d = 0;
#if defined(__AVX512F__)
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512i nibble = _mm512_set1_epi32(inverse == 0 ? 0 : 15);
  const auto codes = [&](const float* from) {
    return _mm512_and_si512(nibble,
                            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), scale)));
  };
  for (; d + 16 <= half; d += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d),
                     _mm512_cvtepi32_epi8(_mm512_or_si512(
                         codes(c + d), _mm512_slli_epi32(codes(c + half + d), 4))));
#elif defined(__AVX2__)
  const __m256 scale = _mm256_set1_ps(inverse);
  const __m256i nibble = _mm256_set1_epi32(inverse == 0 ? 0 : 15);
  const auto codes = [&](const float* from) {
    return _mm256_and_si256(nibble,
                            _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), scale)));
  };
  for (; d + 8 <= half; d += 8) {
    const __m256i both =
        _mm256_or_si256(codes(c + d), _mm256_slli_epi32(codes(c + half + d), 4));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(both),
                                           _mm256_extracti128_si256(both, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + d), _mm_packus_epi16(words, words));
  }
#endif
  for (; d < half; ++d)
    out[d] = static_cast<uint8_t>(code(c[d], inverse) | code(c[half + d], inverse) << 4);
}

int64_t scratch_floats(const SaleQuantizeParams& p) { return kMaxBlock * p.D; }

// The place of a token's step among those of its tile or block.
inline int64_t place_in(SaleGroup group, int64_t token) {
  return group == SaleGroup::query ? token % 8 : token % 8 / 2;
}

void quantize(const SaleQuantizeParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end,
              const float* center, float floor, float* c) {
  const int64_t tile = p.group == SaleGroup::key ? p.block : 16, row = batch * p.H + head;
  const int64_t n_steps = p.group == SaleGroup::query ? 8 : 4;
  for (int64_t t = begin; t < end; t += tile) {
    const int64_t tokens = end - t < tile ? end - t : tile;
    uint32_t largest[8];
    float inverse[8];
    for (int i = 0; i < 8; ++i) largest[i] = float_to_bits(floor);
    for (int64_t r = 0; r < tokens; ++r) {
      float* x = c + r * p.D;
      to_float(p.dtype, token_row(p, batch, head, t + r), x, p.D);
      int32_t top = 0;
      for (int64_t d = 0; d < p.D; ++d) {
        x[d] -= center[d];
        int32_t bits;
        std::memcpy(&bits, x + d, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
      }
      uint32_t& of_group = largest[place_in(p.group, r)];
      if (static_cast<uint32_t>(top) > of_group) of_group = top;
    }
    float* steps = p.step + row * p.groups + t / tile * n_steps;
    for (int64_t i = 0; i < n_steps; ++i) {
      const float m = bits_to_float(largest[i]);
      const bool none = largest[i] >= kInfinity || m < 0x1p-58f;
      steps[i] = largest[i] >= kInfinity ? NAN : none ? 0 : m / 7;
      inverse[i] = none ? 0 : 7 / m;
    }
    uint8_t* out = p.packed + (row * p.T + t) * (p.D / 2);
    for (int64_t r = 0; r < tokens; ++r)
      pack_row(c + r * p.D, p.D / 2, inverse[place_in(p.group, r)], out + r * (p.D / 2));
  }
}

constexpr QuantizeKernel quantize_kernel() { return {sum, scratch_floats, quantize}; }

}  // namespace
}  // namespace sparse_attn
