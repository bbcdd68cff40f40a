// What the float kernels share: products of rows with columns that stand in SIMD lanes, masks.
#pragma once
#include "block_sparse_attention.h"
#include "simd.h"

namespace sparse_attn {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int kLanes = 2 * kWidth;          // columns of a lane block
constexpr int kRegisterRows = kWidth == 16 ? 12 : 4;  // times two vectors, held in registers

// c [kCount][2 vectors] += a(row, k) * b [k][kLanes] over k < n
template <int kCount, class Element>
inline void multiply(Vec (&c)[kCount][2], Element a, const float* b, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const Vec b0 = Vec::load(b + k * kLanes), b1 = Vec::load(b + k * kLanes + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
      const Vec x = Vec::set(a(r, k));
      c[r][0] = Vec::fma(x, b0, c[r][0]);
      c[r][1] = Vec::fma(x, b1, c[r][1]);
    }
  }
}

template <int kCount>
inline void dot_some(const float* rows, int64_t stride, int64_t depth, const float* columns,
                     float* out) {
  Vec c[kCount][2];
  for (auto& x : c) x[0] = x[1] = Vec::zero();
  multiply(c, [=](int r, int64_t d) { return rows[r * stride + d]; }, columns, depth);
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < 2; ++v) c[r][v].store(out + r * kLanes + v * kWidth);
}

// Inlined, so that a constant n is one inside. out [n][kLanes] = rows [n][depth] * columns [depth][kLanes]
[[gnu::always_inline]] inline void dot_rows(const float* rows, int64_t stride, int n, int64_t depth,
                                            const float* columns, float* out) {
  int r = 0;
  for (; r + kRegisterRows <= n; r += kRegisterRows)
    dot_some<kRegisterRows>(rows + r * stride, stride, depth, columns, out + r * kLanes);
  if constexpr (kRegisterRows > 8)
    for (; r + 8 <= n; r += 8)
      dot_some<8>(rows + r * stride, stride, depth, columns, out + r * kLanes);
  for (; r + 4 <= n; r += 4)
    dot_some<4>(rows + r * stride, stride, depth, columns, out + r * kLanes);
  for (; r < n; ++r) dot_some<1>(rows + r * stride, stride, depth, columns, out + r * kLanes);
}

template <int kCount>
inline void add_some(const float* rows, int64_t stride, int n, const float* weights, float* sums) {
  Vec c[kCount][2];
  for (int d = 0; d < kCount; ++d)
    for (int v = 0; v < 2; ++v) c[d][v] = Vec::load(sums + d * kLanes + v * kWidth);
  multiply(c, [=](int d, int64_t r) { return rows[r * stride + d]; }, weights, n);
  for (int d = 0; d < kCount; ++d)
    for (int v = 0; v < 2; ++v) c[d][v].store(sums + d * kLanes + v * kWidth);
}

// sums [depth][kLanes] += rows [n][depth]^T * weights [n][kLanes]
[[gnu::always_inline]] inline void add_rows(const float* rows, int64_t stride, int n, int64_t depth,
                                            const float* weights, float* sums) {
  int64_t d = 0;
  for (; d + kRegisterRows <= depth; d += kRegisterRows)
    add_some<kRegisterRows>(rows + d, stride, n, weights, sums + d * kLanes);
  if constexpr (kRegisterRows > 8)
    for (; d + 8 <= depth; d += 8)
      add_some<8>(rows + d, stride, n, weights, sums + d * kLanes);
  for (; d + 4 <= depth; d += 4) add_some<4>(rows + d, stride, n, weights, sums + d * kLanes);
  for (; d < depth; ++d) add_some<1>(rows + d, stride, n, weights, sums + d * kLanes);
}

// The lowest and the highest key of a group.
inline void span_of(const KeyGroup& g, int32_t* first, int32_t* last) {
  *first = g.tokens == nullptr ? g.first : g.tokens[0];
  *last = g.tokens == nullptr ? g.first + kGroupKeys - 1 : *first;
  if (g.tokens == nullptr) return;
  for (int k = 0; k < kGroupKeys; ++k) {
    if (g.tokens[k] < *first) *first = g.tokens[k];
    if (g.tokens[k] > *last) *last = g.tokens[k];
  }
}

// scores [32 keys][kLanes] that a lane's query may not see become -inf: exponentiated exactly 0.
inline void mask_keys(const BlockSparseAttentionParams& p, const KeyGroup& g,
                      const int32_t* position, float* scores) {
  for (int k = 0; k < kGroupKeys; ++k) {
    const int32_t j = g.tokens == nullptr ? g.first + k : g.tokens[k];
    int32_t low = INT32_MIN, high = INT32_MAX;
    if (p.causal) low = j;
    if (!(g.everyone >> k & 1)) {
      low = j;
      high = g.windowed >> k & 1 ? static_cast<int32_t>(j + p.window - 1) : INT32_MIN;
    }
    for (int v = 0; v < 2; ++v) {
      float* s = scores + k * kLanes + v * kWidth;
      Vec::select(Vec::within(position + v * kWidth, low, high), Vec::load(s),
                  Vec::set(-INFINITY)).store(s);
    }
  }
}

}  // namespace
}  // namespace sparse_attn
