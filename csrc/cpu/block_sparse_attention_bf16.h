// The bf16 tile kernel, shared by the AMX and the AVX512-BF16 unit.
//
// Queries stand in SIMD lanes: a tile computes S^T = K Q^T and O^T += V^T P^T, so that the softmax
// works lane by lane and K is read where it lies. The work is a sequence of units: 32 keys times a
// lane block of 32 queries. While the vector ports exponentiate one unit, `Engine` computes the
// scores of the next and the sums of the chunk before.
#pragma once
#include <cmath>

#include "block_sparse_attention_bf16_layout.h"

namespace sparse_attn {
namespace {

// One group of a chunk, ready to be multiplied.
struct Operand {
  const KeyGroup* group;
  const uint16_t* key;    // rows of key_stride elements
  int64_t key_stride;
  const uint16_t* value;  // [padded Dv][32]
  int32_t first, last;    // smallest and largest key position
};

template <class Engine>
class Tile {
 public:
  Tile(const Params& p, const QueryTile& tile, const void* packed, void* scratch)
      : p_(p), tile_(tile), packed_(static_cast<const uint16_t*>(packed)),
        factor_(std::fabs(p.scale) * 1.44269504088896341f) {
    Scratch::layout(p, static_cast<char*>(scratch), &s_);
    blocks_ = static_cast<int>((tile.rows() + kLanes - 1) / kLanes);
    name_rows();
    pack_queries();
    start_rows();
  }

  void run(const KeyGroup* groups, int64_t n) {
    groups_ = groups;
    n_groups_ = n;
    Unit now;
    if (n == 0 || !find(now)) return;
    start_scores(now, 0);
    engine_.finish_scores();
    for (int buffer = 0;; buffer ^= 1) {
      Unit next = now;
      ++next.block;
      const bool more = find(next);
      if (more) start_scores(next, buffer ^ 1);
      exponentiate(now, s_.scores[buffer]);
      engine_.finish_scores();
      if (!more || next.chunk != now.chunk) {
        engine_.drain();
        queue_sums(static_cast<int>(now.chunk & 1), 0, blocks_);
      }
      if (!more) break;
      now = next;
    }
    engine_.drain();
  }

  void finish(float* partial) {
    for (int block = 0; block < blocks_; ++block)
      for (int v = 0; v < 2; ++v)
        for (int64_t d = 0; d < p_.Dv; d += 16) store_rows(block, v, d, partial);
    for (int64_t r = 0; r < tile_.rows(); ++r) {
      const float natural = s_.max[r] * std::fabs(p_.scale);
      const bool none = s_.sum[r] == 0;
      if (partial != nullptr) {
        partial[r * (p_.Dv + 2) + p_.Dv] = none ? kNoKey : natural;
        partial[r * (p_.Dv + 2) + p_.Dv + 1] = s_.sum[r];
      } else {
        p_.lse[(tile_.batch * p_.Hq + head_[r]) * p_.Tq + query_[r]] =
            none ? -INFINITY : natural + std::log(s_.sum[r]);
      }
    }
  }

 private:
  struct Unit {
    int64_t chunk = 0;
    int group = 0, block = 0;  // group within the chunk
  };

  // a table, since rows are asked for so often that dividing each time would show
  void name_rows() {
    int64_t head = tile_.head, query = tile_.query;
    for (int64_t r = 0; r < tile_.rows(); ++r) {
      head_[r] = head;
      query_[r] = query;
      if (++query == tile_.query + tile_.queries) {
        query = tile_.query;
        ++head;
      }
    }
  }

  void pack_queries() {
    pack_lanes(
        [&](int64_t r) {
          return r < tile_.rows() ? row(p_.query, p_.query_stride, tile_.batch, head_[r], query_[r])
                                  : nullptr;
        },
        blocks_ * kLanes, p_.D, p_.scale < 0, s_.q);
  }

  void start_rows() {
    std::memset(s_.out, 0, blocks_ * kLanes * padded_dv(p_) * sizeof(float));
    for (int block = 0; block < blocks_; ++block) {
      lowest_[block] = INT32_MAX;
      highest_[block] = INT32_MIN;
      for (int r = block * kLanes; r < (block + 1) * kLanes; ++r) {
        s_.max[r] = kNoKey;
        s_.sum[r] = 0;
        // empty lanes repeat the last row, so that they never force a mask
        const int64_t real = lesser(static_cast<int64_t>(r), tile_.rows() - 1);
        s_.position[r] = static_cast<int32_t>(p_.Tk - p_.Tq + query_[real]);
        lowest_[block] = lesser(lowest_[block], s_.position[r]);
        highest_[block] = greater(highest_[block], s_.position[r]);
      }
    }
  }

  // Moves u to the first unit at or after it that has a visible key; prepares chunks it enters.
  bool find(Unit& u) {
    for (;; ++u.block) {
      if (u.block == blocks_) {
        u.block = 0;
        ++u.group;
      }
      if (u.group == kChunk) {
        u.group = 0;
        ++u.chunk;
      }
      const int64_t g = u.chunk * kChunk + u.group;
      if (g >= n_groups_) return false;
      if (u.chunk == prepared_) prepare_chunk(prepared_++);
      const Operand& o = operands_[u.chunk & 1][u.group];
      if (!p_.causal || o.first <= highest_[u.block]) return true;
    }
  }

  void prepare_chunk(int64_t chunk) {
    engine_.drain();  // sums of the chunk before the last may still read what is overwritten here
    const int side = static_cast<int>(chunk & 1);
    const int64_t end = lesser(n_groups_, (chunk + 1) * kChunk);
    for (int64_t g = chunk * kChunk; g < end; ++g)
      operands_[side][g - chunk * kChunk] =
          prepare(groups_[g], side, static_cast<int>(g - chunk * kChunk));
  }

  Operand prepare(const KeyGroup& g, int side, int slot) {
    Operand o;
    o.group = &g;
    const bool in_place = g.tokens == nullptr;
    const auto token = [&](int k) { return in_place ? g.first + k : g.tokens[k]; };
    const auto key_row = [&](int k) {
      return row(p_.key, p_.key_stride, tile_.batch, tile_.kv_head, token(k));
    };
    o.first = token(0);
    o.last = token(kGroupKeys - 1);
    if (!in_place) {
      for (int k = 0; k < kGroupKeys; ++k) {
        o.first = lesser(o.first, token(k));
        o.last = greater(o.last, token(k));
      }
    }
    if (in_place && p_.D % 32 == 0) {
      o.key = key_row(0);
      o.key_stride = p_.key_stride[2];
    } else {
      uint16_t* to = s_.keys[side] + slot * kGroupKeys * padded_d(p_);
      for (int k = 0; k < kGroupKeys; ++k)
        for (int64_t d = 0; d < padded_d(p_); d += 32)
          _mm512_store_si512(to + k * padded_d(p_) + d,
                             _mm512_maskz_loadu_epi16(first_halves(p_.D - d), key_row(k) + d));
      o.key = to;
      o.key_stride = padded_d(p_);
    }
    if (in_place && packed_ != nullptr) {
      o.value = packed_ + g.first * padded_dv(p_);
    } else {
      uint16_t* to = s_.values[side] + slot * kGroupKeys * padded_dv(p_);
      transpose_values(
          p_,
          [&](int k) { return row(p_.value, p_.value_stride, tile_.batch, tile_.kv_head, token(k)); },
          kGroupKeys, to);
      o.value = to;
    }
    return o;
  }

  void start_scores(const Unit& u, int buffer) {
    const Operand& o = operands_[u.chunk & 1][u.group];
    engine_.start_scores(o.key, o.key_stride, s_.q + u.block * kLanes * padded_d(p_) / 2,
                         padded_d(p_), s_.scores[buffer]);
  }

  uint32_t* p_of(int side, int group, int block) const {
    return s_.p[side] + (group * kBlocks + block) * kGroupKeys * kLanes / 2;
  }

  // Hands P of the groups of lane blocks [from, to), so far not summed, to the engine.
  void queue_sums(int side, int from, int to) {
    // value slices outermost: the lane blocks find them in the first-level cache
    for (int64_t d = 0; d < padded_dv(p_); d += 32) {
      for (int block = from; block < to; ++block) {
        if (waiting_[block] == 0) continue;
        SumJob job;
        job.n = waiting_[block];
        job.out = s_.out + (block * padded_dv(p_) + d) * kLanes;
        for (int i = 0; i < job.n; ++i) {
          const int group = waiting_group_[block][i];
          job.values[i] = operands_[side][group].value + d * kGroupKeys;
          job.p[i] = p_of(side, group, block);
        }
        engine_.add(job);
      }
    }
    for (int block = from; block < to; ++block) waiting_[block] = 0;
  }

  void exponentiate(const Unit& u, const float* scores) {
    const Operand& o = operands_[u.chunk & 1][u.group];
    const int side = static_cast<int>(u.chunk & 1);
    uint32_t* p = p_of(side, u.group, u.block);
    if (o.group->everyone != ~0u || (p_.causal && o.last > lowest_[u.block])) {
      mask(*o.group, u.block);
      exponentiate_lanes<true>(u, scores, p);
    } else {
      exponentiate_lanes<false>(u, scores, p);
    }
    waiting_group_[u.block][waiting_[u.block]++] = u.group;
  }

  // bit l of allowed_[key][v]: lane l of vector v may see the key
  void mask(const KeyGroup& g, int block) {
    const auto window = static_cast<int32_t>(p_.window);
    for (int v = 0; v < 2; ++v) {
      const __m512i at = _mm512_load_si512(s_.position + block * kLanes + v * 16);
      const __m512i before_window = _mm512_sub_epi32(at, _mm512_set1_epi32(window));
      for (int k = 0; k < kGroupKeys; ++k) {
        const __m512i j = _mm512_set1_epi32(g.tokens == nullptr ? g.first + k : g.tokens[k]);
        __mmask16 m = 0;
        if (g.everyone >> k & 1)
          m = 0xffff;
        else if (g.windowed >> k & 1)
          m = _mm512_cmpgt_epi32_mask(j, before_window);
        if (p_.causal) m &= _mm512_cmple_epi32_mask(j, at);
        allowed_[k][v] = m;
      }
    }
  }

  template <bool kMasked>
  void exponentiate_lanes(const Unit& u, const float* scores, uint32_t* p) {
    const __m512 low = _mm512_set1_ps(-3.4e38f);
    __m512 top[2][2] = {{low, low}, {low, low}};
    for (int k = 0; k < kGroupKeys; k += 2) {
      for (int i = 0; i < 4; ++i) {
        const int key = k + i / 2, v = i % 2;
        const __m512 x = _mm512_load_ps(scores + key * kLanes + v * 16);
        __m512& t = top[v][i / 2];
        t = kMasked ? _mm512_mask_max_ps(t, allowed_[key][v], t, x) : _mm512_max_ps(t, x);
      }
    }
    raise_max(u, _mm512_max_ps(top[0][0], top[0][1]), _mm512_max_ps(top[1][0], top[1][1]));

    const __m512 factor = _mm512_set1_ps(factor_);
    const __m512i interleave = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    float* const totals = s_.sum + u.block * kLanes;
    __m512 base[2], total[2][2];
    for (int v = 0; v < 2; ++v) {
      base[v] = _mm512_mul_ps(_mm512_load_ps(s_.max + u.block * kLanes + v * 16), factor);
      total[v][0] = _mm512_load_ps(totals + v * 16);
      total[v][1] = _mm512_setzero_ps();
    }
    for (int k = 0; k < kGroupKeys; k += 2) {
      if (k % 4 == 0) {
        engine_.tick();
        prefetch(u, k / 4);
      }
      for (int v = 0; v < 2; ++v) {
        const float* s = scores + k * kLanes + v * 16;
        __m512 x = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(s), factor, base[v]));
        __m512 y = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(s + kLanes), factor, base[v]));
        if (kMasked) {
          x = _mm512_maskz_mov_ps(allowed_[k][v], x);
          y = _mm512_maskz_mov_ps(allowed_[k + 1][v], y);
        }
        total[v][0] = _mm512_add_ps(total[v][0], x);
        total[v][1] = _mm512_add_ps(total[v][1], y);
        const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(y, x);
        _mm512_store_si512(p + (v * 16 + k / 2) * 16, _mm512_permutexvar_epi16(interleave, pair));
      }
    }
    for (int v = 0; v < 2; ++v)
      _mm512_store_ps(totals + v * 16, _mm512_add_ps(total[v][0], total[v][1]));
  }

  // A lane's reference moves only when its maximum has outgrown it by 2^8. That is exact all the
  // same, since numerator and denominator share it, and the output is hardly ever rescaled.
  void raise_max(const Unit& u, __m512 top0, __m512 top1) {
    const __m512 slack = _mm512_set1_ps(8.0f / factor_);
    const __m512 top[2] = {top0, top1};
    __mmask16 grown[2];
    for (int v = 0; v < 2; ++v) {
      const __m512 old = _mm512_load_ps(s_.max + u.block * kLanes + v * 16);
      grown[v] = _mm512_cmp_ps_mask(top[v], _mm512_add_ps(old, slack), _CMP_GT_OQ);
    }
    if ((grown[0] | grown[1]) == 0) return;
    // what was exponentiated with the old reference is summed before the sums are rescaled
    engine_.finish_scores();
    engine_.drain();
    queue_sums(static_cast<int>(u.chunk & 1), u.block, u.block + 1);
    engine_.drain();
    for (int v = 0; v < 2; ++v) {
      if (grown[v] == 0) continue;
      float* stored = s_.max + u.block * kLanes + v * 16;
      float* sum = s_.sum + u.block * kLanes + v * 16;
      const __m512 old = _mm512_load_ps(stored);
      const __m512 max = _mm512_mask_mov_ps(old, grown[v], top[v]);
      _mm512_store_ps(stored, max);
      const __m512 difference = _mm512_mul_ps(_mm512_sub_ps(old, max), _mm512_set1_ps(factor_));
      // lanes that stay keep a factor of exactly 1
      const __m512 shrink = _mm512_mask_mov_ps(
          _mm512_set1_ps(1.0f), grown[v],
          exp2_bf16(_mm512_max_ps(difference, _mm512_set1_ps(-1000.0f))));
      _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), shrink));
      // at the first keys there is nothing to rescale yet
      if (_mm512_cmp_ps_mask(_mm512_load_ps(sum), _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0) continue;
      float* out = s_.out + u.block * padded_dv(p_) * kLanes + v * 16;
      for (int64_t d = 0; d < padded_dv(p_); ++d)
        _mm512_store_ps(out + d * kLanes, _mm512_mul_ps(_mm512_load_ps(out + d * kLanes), shrink));
    }
  }

  // Fetches the keys and values that the next chunk has in this unit's place, a few lines at each
  // of the unit's eight ticks: tile loads are too irregular for the hardware prefetcher.
  void prefetch(const Unit& u, int tick) const {
    const int64_t at = (u.chunk + 1) * kChunk + u.group;
    if (at >= n_groups_ || groups_[at].tokens != nullptr) return;
    const int part = u.block * 8 + tick, parts = blocks_ * 8;
    const uint16_t* keys =
        row(p_.key, p_.key_stride, tile_.batch, tile_.kv_head, groups_[at].first);
    for (int r = part * kGroupKeys / parts; r < (part + 1) * kGroupKeys / parts; ++r)
      for (int64_t d = 0; d < p_.D; d += 32)
        _mm_prefetch(keys + r * p_.key_stride[2] + d, _MM_HINT_T1);
    if (packed_ == nullptr) return;
    const uint16_t* values = packed_ + groups_[at].first * padded_dv(p_);
    for (int64_t d = part * padded_dv(p_) / parts; d < (part + 1) * padded_dv(p_) / parts; ++d)
      _mm_prefetch(values + d * kGroupKeys, _MM_HINT_T1);
  }

  void store_rows(int block, int v, int64_t d, float* partial) {
    const float* out = s_.out + (block * padded_dv(p_) + d) * kLanes + v * 16;
    const int64_t lane = block * kLanes + v * 16;
    __m512 scale = _mm512_set1_ps(1.0f);
    if (partial == nullptr) {
      const __m512 sum = _mm512_load_ps(s_.sum + lane);
      scale = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ), scale,
                                  sum);
    }
    __m512i r[16];
    for (int i = 0; i < 16; ++i)
      r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(out + i * kLanes), scale));
    transpose16(r);
    const __mmask16 mask = first_lanes(p_.Dv - d);
    for (int64_t n = lane; n < lesser(lane + 16, tile_.rows()); ++n) {
      const __m512 x = _mm512_castsi512_ps(r[n - lane]);
      if (partial != nullptr) {
        _mm512_mask_storeu_ps(partial + n * (p_.Dv + 2) + d, mask, x);
      } else {
        auto* to = static_cast<uint16_t*>(p_.out) + tile_.batch * p_.out_stride[0] +
                   head_[n] * p_.out_stride[1] + query_[n] * p_.out_stride[2];
        _mm256_mask_storeu_epi16(to + d, mask, (__m256i)_mm512_cvtneps_pbh(x));
      }
    }
  }

  const Params& p_;
  const QueryTile& tile_;
  const uint16_t* packed_;
  const float factor_;  // |scale| * log2(e)
  Scratch s_;
  Engine engine_;
  int blocks_;
  const KeyGroup* groups_ = nullptr;
  int64_t n_groups_ = 0, prepared_ = 0;
  Operand operands_[2][kChunk];
  int64_t head_[kMaxRows], query_[kMaxRows];
  int waiting_[kBlocks] = {};  // groups of the current chunk whose P is not yet queued
  int waiting_group_[kBlocks][kChunk];
  int32_t lowest_[kBlocks], highest_[kBlocks];  // positions of a block's queries
  __mmask16 allowed_[kGroupKeys][2];
};

}  // namespace
}  // namespace sparse_attn
