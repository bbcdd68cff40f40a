// The decode kernel: few query rows against many keys, bound by memory. Keys and values are read
// once, where they lie; rows of a GQA group share what was read.
//
// `Math` multiplies, in the precision and the layout that suit its instructions:
//   kRows                         query rows
//   Math(params, scratch)
//   set_query(row, elements)
//   score(keys, next)             scores [kRows][32] = query . key; fetches the next group's keys
//   add(values, next)             out += weights * values, the weights standing where scores stood
//   rescale(row, factor)          out[row] *= factor
//   read_out(row, to)             out[row] in its natural order
#pragma once
#include "block_sparse_attention.h"
#include "simd.h"

namespace sparse_attn {
namespace {

using Params = BlockSparseAttentionParams;

constexpr int kDecodeRowsMax = 8;

// Where the 32 keys or values of a group lie.
using Rows = const char* [kGroupKeys];

struct DecodeScratch {
  float* q;       // [rows][D rounded up to 32]
  float* out;     // [rows][Dv rounded up to 32]
  float* scores;  // [rows][32], turned into weights in place
  float* row;     // [Dv] a result on its way out

  static int64_t layout(const Params& p, char* base, DecodeScratch* s) {
    char* at = base;
    const auto take = [&at](auto*& pointer, int64_t elements) {
      pointer = reinterpret_cast<decltype(+pointer)>(at);
      at += round_up(elements * 4, 64);
    };
    DecodeScratch t;
    take(t.q, kDecodeRowsMax * round_up(p.D, 32));
    take(t.out, kDecodeRowsMax * round_up(p.Dv, 32));
    take(t.scores, kDecodeRowsMax * kGroupKeys);
    take(t.row, p.Dv);
    if (s != nullptr) *s = t;
    return at - base;
  }
};

int64_t decode_scratch_bytes(const Params& p) { return DecodeScratch::layout(p, nullptr, nullptr); }

// To the second-level cache: the first has too few line buffers to wait for memory.
inline void prefetch(const char* line) { __builtin_prefetch(line, 0, 2); }

inline float sum_lanes(Vec x) {
  float lanes[Vec::kWidth], sum = 0;
  x.store(lanes);
  for (float lane : lanes) sum += lane;
  return sum;
}

inline float max_lanes(Vec x) {
  float lanes[Vec::kWidth];
  x.store(lanes);
  float top = lanes[0];
  for (float lane : lanes) top = lane > top ? lane : top;
  return top;
}

template <class Math>
class Decode {
 public:
  static constexpr int kRows = Math::kRows;

  Decode(const Params& p, const QueryTile& tile, void* scratch)
      : p_(p), tile_(tile), to_log2_(p.scale * 1.44269504088896341f),
        keys_(element(p.dtype, p.key, p.key_stride, tile.batch, tile.kv_head, 0)),
        values_(element(p.dtype, p.value, p.value_stride, tile.batch, tile.kv_head, 0)),
        key_step_(p.key_stride[2] * element_bytes(p.dtype)),
        value_step_(p.value_stride[2] * element_bytes(p.dtype)),
        math_(p, layout(p, scratch, s_)) {
    for (int r = 0; r < kRows; ++r) {
      math_.set_query(r, element(p.dtype, p.query, p.query_stride, tile.batch, head_of(r),
                                 query_of(r)));
      max_[r] = kNoKey;
      sum_[r] = 0;
    }
    std::memset(s_.out, 0, kRows * round_up(p.Dv, 32) * sizeof(float));
  }

  void run(const KeyGroup* groups, int64_t n) {
    if (n == 0) return;
    Rows keys[2], values[2];
    find(groups[0], keys[0], values[0]);
    for (int64_t g = 0; g < n; ++g) {
      const int now = static_cast<int>(g & 1);
      find(groups[g + 1 < n ? g + 1 : g], keys[now ^ 1], values[now ^ 1]);
      math_.score(keys[now], keys[now ^ 1]);
      for (int r = 0; r < kRows; ++r) exponentiate(groups[g], r);
      math_.add(values[now], values[now ^ 1]);
    }
  }

  void finish(float* partial) {
    for (int r = 0; r < kRows; ++r) {
      const float natural = max_[r] * 0.69314718055994531f, sum = sum_[r];
      if (partial != nullptr) {
        float* to = partial + r * (p_.Dv + 2);
        math_.read_out(r, to);
        to[p_.Dv] = sum == 0 ? kNoKey : natural;
        to[p_.Dv + 1] = sum;
        continue;
      }
      math_.rescale(r, sum == 0 ? 0.0f : 1.0f / sum);
      math_.read_out(r, s_.row);
      const int64_t at = tile_.batch * p_.out_stride[0] + head_of(r) * p_.out_stride[1] +
                         query_of(r) * p_.out_stride[2];
      for (int64_t d = 0; d < p_.Dv; ++d) from_float(p_.dtype, s_.row[d], p_.out, at + d);
      p_.lse[(tile_.batch * p_.Hq + head_of(r)) * p_.Tq + query_of(r)] =
          sum == 0 ? -INFINITY : natural + std::log(sum);
    }
  }

 private:
  static const DecodeScratch& layout(const Params& p, void* scratch, DecodeScratch& s) {
    DecodeScratch::layout(p, static_cast<char*>(scratch), &s);
    return s;
  }

  int64_t head_of(int r) const { return tile_.head + r / tile_.queries; }
  int64_t query_of(int r) const { return tile_.query + r % tile_.queries; }

  static int64_t token(const KeyGroup& g, int k) {
    return g.tokens == nullptr ? g.first + k : g.tokens[k];
  }

  void find(const KeyGroup& g, Rows& keys, Rows& values) const {
    if (p_.block_table == nullptr) {
      for (int k = 0; k < kGroupKeys; ++k) {
        const int64_t t = token(g, k);
        keys[k] = keys_ + t * key_step_;
        values[k] = values_ + t * value_step_;
      }
      return;
    }
    for (int k = 0; k < kGroupKeys; ++k) {
      const int64_t t = token(g, k);
      keys[k] = cached(p_, p_.key, p_.key_stride, tile_.batch, tile_.kv_head, t);
      values[k] = cached(p_, p_.value, p_.value_stride, tile_.batch, tile_.kv_head, t);
    }
  }

  void exponentiate(const KeyGroup& g, int r) {
    constexpr int kWidth = Vec::kWidth;
    float* scores = s_.scores + r * kGroupKeys;
    const Vec factor = Vec::set(to_log2_);
    for (int k = 0; k < kGroupKeys; k += kWidth)
      (Vec::load(scores + k) * factor).store(scores + k);
    hide(g, r, scores);
    Vec top = Vec::set(max_[r]);
    for (int k = 0; k < kGroupKeys; k += kWidth) top = Vec::max(top, Vec::load(scores + k));
    const float old = max_[r];
    max_[r] = max_lanes(top);
    if (max_[r] != old) {
      const float shrink = std::exp2(old - max_[r]);
      sum_[r] *= shrink;
      math_.rescale(r, shrink);
    }
    Vec sum = Vec::zero();
    for (int k = 0; k < kGroupKeys; k += kWidth) {
      const Vec weight = exp2(Vec::load(scores + k) - Vec::set(max_[r]));
      weight.store(scores + k);
      sum = sum + weight;
    }
    sum_[r] += sum_lanes(sum);
  }

  // Scores of keys that the row does not see become -infinity.
  void hide(const KeyGroup& g, int r, float* scores) const {
    const int64_t position = p_.Tk - p_.Tq + query_of(r);
    const bool below = !p_.causal || (g.tokens == nullptr && g.first + kGroupKeys - 1 <= position);
    if (g.everyone == ~0u && below) return;
    for (int k = 0; k < kGroupKeys; ++k) {
      const int64_t j = token(g, k);
      bool seen = g.everyone >> k & 1;
      seen |= (g.windowed >> k & 1) && j > position - p_.window && j <= position;
      if (!seen || (p_.causal && j > position)) scores[k] = -INFINITY;
    }
  }

  const Params& p_;
  const QueryTile& tile_;
  const float to_log2_;
  const char *const keys_, *const values_;  // of the head, where they are not in pages
  const int64_t key_step_, value_step_;     // bytes from one token to the next
  DecodeScratch s_;
  Math math_;
  float max_[kRows], sum_[kRows];  // the maximum in powers of two
};

template <class Math>
void decode(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
            void* scratch, float* partial) {
  Decode<Math> d(p, tile, scratch);
  d.run(groups, n);
  d.finish(partial);
}

}  // namespace
}  // namespace sparse_attn
