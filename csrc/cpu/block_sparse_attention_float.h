// The float32 tile kernel, for every dtype and any vector width.
//
// Queries stand in SIMD lanes, as in block_sparse_attention_bf16.h: S^T [key][lane] and
// O^T [Dv][lane] are built from broadcast elements of K and V, which are read where they lie.
#pragma once
#include "block_sparse_attention.h"
#include "lanes.h"

namespace sparse_attn {
namespace {

using Params = BlockSparseAttentionParams;

constexpr int kChunkKeys = 2 * kGroupKeys;  // keys whose scores are held at once

struct FloatScratch {
  float* q;           // [kMaxRows / kLanes][D][kLanes]
  float* out;         // [kMaxRows / kLanes][Dv][kLanes]
  float* scores;      // [kChunkKeys][kLanes], exponentiated in place
  float* keys;        // [kChunkKeys][D]
  float* values;      // [kChunkKeys][Dv]
  float* max;         // [kMaxRows] raw score that was subtracted
  float* sum;         // [kMaxRows]
  int32_t* position;  // [kMaxRows]

  static int64_t layout(const Params& p, char* base, FloatScratch* s) {
    char* at = base;
    const auto take = [&at](auto*& pointer, int64_t elements) {
      pointer = reinterpret_cast<decltype(+pointer)>(at);
      at += round_up(elements * 4, 64);
    };
    FloatScratch t;
    take(t.q, kMaxRows * p.D);
    take(t.out, kMaxRows * p.Dv);
    take(t.scores, kChunkKeys * kLanes);
    take(t.keys, kChunkKeys * p.D);
    take(t.values, kChunkKeys * p.Dv);
    take(t.max, kMaxRows);
    take(t.sum, kMaxRows);
    take(t.position, kMaxRows);
    if (s != nullptr) *s = t;
    return at - base;
  }
};

int64_t float_scratch_bytes(const Params& p) { return FloatScratch::layout(p, nullptr, nullptr); }

class FloatTile {
 public:
  FloatTile(const Params& p, const QueryTile& tile, void* scratch)
      : p_(p), tile_(tile), factor_(std::fabs(p.scale) * 1.44269504088896341f) {
    FloatScratch::layout(p, static_cast<char*>(scratch), &s_);
    blocks_ = static_cast<int>((tile.rows() + kLanes - 1) / kLanes);
    load_queries();
  }

  void run(const KeyGroup* groups, int64_t n) {
    constexpr int kGroups = kChunkKeys / kGroupKeys;
    for (int64_t g = 0; g < n; g += kGroups) {
      const int count = static_cast<int>(n - g < kGroups ? n - g : kGroups);
      for (int i = 0; i < count; ++i) prepare(groups[g + i], i);
      for (int block = 0; block < blocks_; ++block) step(groups + g, count, block);
    }
  }

  void finish(float* partial) {
    for (int64_t r = 0; r < tile_.rows(); ++r) {
      const float* out = s_.out + r / kLanes * p_.Dv * kLanes + r % kLanes;
      const float natural = s_.max[r] * std::fabs(p_.scale), sum = s_.sum[r];
      const int64_t head = tile_.head + r / tile_.queries, query = tile_.query + r % tile_.queries;
      if (partial != nullptr) {
        float* to = partial + r * (p_.Dv + 2);
        for (int64_t d = 0; d < p_.Dv; ++d) to[d] = out[d * kLanes];
        to[p_.Dv] = sum == 0 ? kNoKey : natural;
        to[p_.Dv + 1] = sum;
        continue;
      }
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      const int64_t at = tile_.batch * p_.out_stride[0] + head * p_.out_stride[1] +
                         query * p_.out_stride[2];
      for (int64_t d = 0; d < p_.Dv; ++d)
        from_float(p_.dtype, out[d * kLanes] * inverse, p_.out, at + d);
      p_.lse[(tile_.batch * p_.Hq + head) * p_.Tq + query] =
          sum == 0 ? -INFINITY : natural + std::log(sum);
    }
  }

 private:
  void load_queries() {
    const float sign = p_.scale < 0 ? -1.0f : 1.0f;
    std::memset(s_.q, 0, blocks_ * kLanes * p_.D * sizeof(float));
    std::memset(s_.out, 0, blocks_ * kLanes * p_.Dv * sizeof(float));
    for (int64_t r = 0; r < blocks_ * kLanes; ++r) {
      // empty lanes repeat the last row's position, so that they never force a mask
      const int64_t real = r < tile_.rows() ? r : tile_.rows() - 1;
      const int64_t query = tile_.query + real % tile_.queries;
      s_.max[r] = kNoKey;
      s_.sum[r] = 0;
      s_.position[r] = static_cast<int32_t>(p_.Tk - p_.Tq + query);
      const int block = static_cast<int>(r / kLanes);
      if (r % kLanes == 0) lowest_[block] = highest_[block] = s_.position[r];
      if (s_.position[r] < lowest_[block]) lowest_[block] = s_.position[r];
      if (s_.position[r] > highest_[block]) highest_[block] = s_.position[r];
      if (r >= tile_.rows()) continue;
      to_float(p_.dtype, element(p_.dtype, p_.query, p_.query_stride, tile_.batch,
                                 tile_.head + real / tile_.queries, query), s_.keys, p_.D);
      float* q = s_.q + block * p_.D * kLanes + r % kLanes;
      for (int64_t d = 0; d < p_.D; ++d) q[d * kLanes] = sign * s_.keys[d];
    }
  }

  // Points keys_ and values_ at the rows of one group: in place where they are float already.
  void prepare(const KeyGroup& g, int slot) {
    const auto key = [&](int64_t t) {
      return cached(p_, p_.key, p_.key_stride, tile_.batch, tile_.kv_head, t);
    };
    const auto value = [&](int64_t t) {
      return cached(p_, p_.value, p_.value_stride, tile_.batch, tile_.kv_head, t);
    };
    span_of(g, &first_[slot], &last_[slot]);
    if (in_one_piece(p_, g) && p_.dtype == DType::f32) {
      keys_[slot] = reinterpret_cast<const float*>(key(g.first));
      values_[slot] = reinterpret_cast<const float*>(value(g.first));
      key_stride_[slot] = p_.key_stride[2];
      value_stride_[slot] = p_.value_stride[2];
      return;
    }
    float* keys = s_.keys + slot * kGroupKeys * p_.D;
    float* values = s_.values + slot * kGroupKeys * p_.Dv;
    for (int k = 0; k < kGroupKeys; ++k) {
      const int64_t t = g.tokens == nullptr ? g.first + k : g.tokens[k];
      to_float(p_.dtype, key(t), keys + k * p_.D, p_.D);
      to_float(p_.dtype, value(t), values + k * p_.Dv, p_.Dv);
    }
    keys_[slot] = keys;
    values_[slot] = values;
    key_stride_[slot] = p_.D;
    value_stride_[slot] = p_.Dv;
  }

  void step(const KeyGroup* groups, int count, int block) {
    int active[kChunkKeys / kGroupKeys], n = 0;
    for (int i = 0; i < count; ++i)
      if (!p_.causal || first_[i] <= highest_[block]) active[n++] = i;
    if (n == 0) return;
    Vec top[2] = {Vec::set(-3.4e38f), Vec::set(-3.4e38f)};
    for (int i = 0; i < n; ++i) {
      float* scores = s_.scores + i * kGroupKeys * kLanes;
      dot_rows(keys_[active[i]], key_stride_[active[i]], kGroupKeys, p_.D,
               s_.q + block * p_.D * kLanes, scores);
      const KeyGroup& g = groups[active[i]];
      if (g.everyone != ~0u || (p_.causal && last_[active[i]] > lowest_[block]))
        mask_keys(p_, g, s_.position + block * kLanes, scores);
      for (int k = 0; k < kGroupKeys; ++k)
        for (int v = 0; v < 2; ++v)
          top[v] = Vec::max(top[v], Vec::load(scores + k * kLanes + v * kWidth));
    }
    for (int v = 0; v < 2; ++v) exponentiate(n * kGroupKeys, top[v], block, v);
    for (int i = 0; i < n; ++i)
      add_rows(values_[active[i]], value_stride_[active[i]], kGroupKeys, p_.Dv,
               s_.scores + i * kGroupKeys * kLanes, s_.out + block * p_.Dv * kLanes);
  }

  void exponentiate(int keys, Vec top, int block, int v) {
    const int lane = block * kLanes + v * kWidth;
    const Vec factor = Vec::set(factor_), old = Vec::load(s_.max + lane);
    // a lane's reference moves only when its maximum has outgrown it by 2^8: exact all the same,
    // since numerator and denominator share it
    const auto grown = Vec::greater(top, old + Vec::set(8.0f / factor_));
    const Vec max = Vec::select(grown, top, old);
    Vec sum = Vec::load(s_.sum + lane);
    if (Vec::any(grown)) {
      const Vec shrink = Vec::select(grown, exp2((old - max) * factor), Vec::set(1.0f));
      sum = sum * shrink;
      max.store(s_.max + lane);
      float* out = s_.out + block * p_.Dv * kLanes + v * kWidth;
      for (int64_t d = 0; d < p_.Dv; ++d)
        (Vec::load(out + d * kLanes) * shrink).store(out + d * kLanes);
    }
    for (int k = 0; k < keys; ++k) {
      float* s = s_.scores + k * kLanes + v * kWidth;
      // subtract first: the difference of two large scores is exact, that of their products not
      const Vec x = Vec::load(s);
      const Vec e = Vec::select(Vec::differ(x, Vec::set(-INFINITY)),
                                exp2((x - max) * factor), Vec::zero());
      sum = sum + e;
      e.store(s);
    }
    sum.store(s_.sum + lane);
  }

  const Params& p_;
  const QueryTile& tile_;
  const float factor_;  // |scale| * log2(e)
  FloatScratch s_;
  int blocks_;
  const float* keys_[kChunkKeys / kGroupKeys];
  const float* values_[kChunkKeys / kGroupKeys];
  int64_t key_stride_[kChunkKeys / kGroupKeys], value_stride_[kChunkKeys / kGroupKeys];
  int32_t first_[kChunkKeys / kGroupKeys], last_[kChunkKeys / kGroupKeys];
  int32_t lowest_[kMaxRows / kLanes], highest_[kMaxRows / kLanes];
};

void float_tile(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                const void*, void* scratch, float* partial) {
  FloatTile t(p, tile, scratch);
  t.run(groups, n);
  t.finish(partial);
}

}  // namespace
}  // namespace sparse_attn
