// Turns one row of a BlockIndex, the sink and the window into groups of keys for the kernels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "block_sparse_attention.h"

namespace sparse_attn {

inline int64_t index_head(const BlockSparseAttentionParams& p, int64_t head) {
  if (p.Hi == 1) return 0;
  return p.Hi == p.Hq ? head : head / (p.Hq / p.Hkv);
}

class KeyGroups {
 public:
  void build(const BlockSparseAttentionParams& p, const QueryTile& tile) {
    groups_.clear();
    tokens_.clear();
    open_ = 0;
    Tk_ = p.Tk;
    const int64_t first = p.Tk - p.Tq + tile.query;  // positions of the tile's first and last query
    const int64_t last = first + tile.queries - 1;
    const int64_t limit = p.causal ? std::clamp<int64_t>(last + 1, 0, p.Tk) : p.Tk;
    collect(p, tile, last, limit);
    for (const Span& s : spans_) emit(s.begin, s.end, /*windowed=*/false);
    if (p.window > 0) {
      // keys that only the earlier rows of the tile still have in their window
      const int64_t end = std::clamp<int64_t>(last - p.window + 1, 0, limit);
      emit_uncovered(std::clamp<int64_t>(first - p.window + 1, 0, end), end);
    }
    finish();
  }

  // Tokens [from, to), counted along runs that every row sees, causality apart: run r begins at
  // starts[r], runs 0 to r have sums[r] tokens. Whole groups where the grid allows it, the rest is
  // gathered: no key is read for nothing.
  void build_runs(const int32_t* starts, const int32_t* sums, int64_t n, int64_t from, int64_t to) {
    groups_.clear();
    tokens_.clear();
    open_ = 0;
    int64_t r = std::upper_bound(sums, sums + n, from) - sums;
    for (int64_t before = r > 0 ? sums[r - 1] : 0; from < to; from = before = sums[r++]) {
      const int64_t begin = starts[r] + from - before;
      const int64_t end = starts[r] + std::min<int64_t>(to, sums[r]) - before;
      const int64_t first = std::min(end, round_up(begin, kGroupKeys));
      const int64_t last = std::max(first, end / kGroupKeys * kGroupKeys);
      gather_all(begin, first);
      for (int64_t base = first; base < last; base += kGroupKeys)
        groups_.push_back({nullptr, static_cast<int32_t>(base), ~0u, 0});
      gather_all(last, end);
    }
    finish();
  }

  const KeyGroup* data() const { return groups_.data(); }
  int64_t size() const { return static_cast<int64_t>(groups_.size()); }

 private:
  struct Span {
    int64_t begin, end;
  };

  // keys that every row may see, as ascending disjoint spans below `limit`
  void collect(const BlockSparseAttentionParams& p, const QueryTile& tile, int64_t last,
               int64_t limit) {
    spans_.clear();
    const int64_t h = index_head(p, tile.head), m = tile.query / p.q_block;
    const int32_t* ids = p.indices + tile.batch * p.indices_stride[0] + h * p.indices_stride[1] +
                         m * p.indices_stride[2];
    const int64_t n = p.K == 0 ? 0
                               : p.counts[tile.batch * p.counts_stride[0] +
                                          h * p.counts_stride[1] + m * p.counts_stride[2]];
    add(0, std::min(p.sink, limit));
    for (int64_t i = 0; i < n; ++i)
      add(ids[i] * p.kv_block, std::min((ids[i] + 1) * p.kv_block, limit));
    if (p.window > 0) {
      // the window of a later row may reach further right than that of an earlier one; without
      // causality the driver makes tiles of one query, so that `last` ends every window
      const int64_t end = std::clamp<int64_t>(last + 1, 0, limit);
      const int64_t begin = std::clamp<int64_t>(last - p.window + 1, 0, end);
      insert(begin, end);
    }
  }

  void add(int64_t begin, int64_t end) {
    if (!spans_.empty()) begin = std::max(begin, spans_.back().end);
    if (begin >= end) return;
    if (!spans_.empty() && spans_.back().end == begin)
      spans_.back().end = end;
    else
      spans_.push_back({begin, end});
  }

  void insert(int64_t begin, int64_t end) {
    if (begin >= end) return;
    size_t at = spans_.size();
    while (at > 0 && spans_[at - 1].end >= begin) --at;  // first span that touches or follows
    size_t stop = at;
    while (stop < spans_.size() && spans_[stop].begin <= end) {
      begin = std::min(begin, spans_[stop].begin);
      end = std::max(end, spans_[stop].end);
      ++stop;
    }
    spans_.erase(spans_.begin() + at, spans_.begin() + stop);
    spans_.insert(spans_.begin() + at, Span{begin, end});
  }

  void emit_uncovered(int64_t begin, int64_t end) {
    for (const Span& s : spans_) {
      if (begin >= end) return;
      if (s.end <= begin) continue;
      if (s.begin > begin) emit(begin, std::min(s.begin, end), true);
      begin = s.end;
    }
    if (begin < end) emit(begin, end, true);
  }

  void emit(int64_t begin, int64_t end, bool windowed) {
    while (begin < end) {
      const int64_t base = begin / kGroupKeys * kGroupKeys;
      const int64_t stop = std::min(end, base + kGroupKeys);
      const int64_t n = stop - begin;
      if (n * 2 >= kGroupKeys && base + kGroupKeys <= Tk_) {
        const uint32_t bits = (n == kGroupKeys ? ~0u : (1u << n) - 1) << (begin - base);
        groups_.push_back({nullptr, static_cast<int32_t>(base), windowed ? 0 : bits,
                           windowed ? bits : 0});
      } else {
        for (int64_t j = begin; j < stop; ++j) gather(j, windowed);
      }
      begin = stop;
    }
  }

  void gather_all(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = std::min<int64_t>(end - begin, kGroupKeys - open_);
      const size_t at = tokens_.size();
      tokens_.resize(at + n);
      for (int64_t i = 0; i < n; ++i) tokens_[at + i] = static_cast<int32_t>(begin + i);
      open_everyone_ |= (n == kGroupKeys ? ~0u : (1u << n) - 1) << open_;
      open_ += static_cast<int>(n);
      if (open_ == kGroupKeys) close();
      begin += n;
    }
  }

  void finish() {
    close();
    for (KeyGroup& g : groups_)
      if (g.first < 0) g.tokens = tokens_.data() + (-1 - g.first);
  }

  void gather(int64_t token, bool windowed) {
    (windowed ? open_windowed_ : open_everyone_) |= 1u << open_;
    tokens_.push_back(static_cast<int32_t>(token));
    if (++open_ == kGroupKeys) close();
  }

  void close() {
    if (open_ > 0) {
      tokens_.resize(tokens_.size() + kGroupKeys - open_, tokens_.back());
      // `first` holds the place in tokens_ until the vector has its final address
      const auto place = static_cast<int32_t>(tokens_.size() - kGroupKeys);
      groups_.push_back({nullptr, -1 - place, open_everyone_, open_windowed_});
    }
    open_ = 0;
    open_everyone_ = open_windowed_ = 0;
  }

  std::vector<KeyGroup> groups_;
  std::vector<int32_t> tokens_;
  std::vector<Span> spans_;
  int64_t Tk_ = 0;
  int open_ = 0;
  uint32_t open_everyone_ = 0, open_windowed_ = 0;
};

}  // namespace sparse_attn
