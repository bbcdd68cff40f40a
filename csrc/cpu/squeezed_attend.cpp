// Driver: tiles of query rows over the kept runs of the context and over their tail. Both are
// calls of the kernels of block_sparse_attention, whose float32 partial results are joined.
#include <numeric>
#include <string>
#include <tuple>

#include "../common/squeezed_attend.h"
#include "block_sparse_attention_parts.h"
#include "key_groups.h"
#include "threads.h"

namespace sparse_attn {
namespace {

using Params = SqueezedAttendParams;
using Attention = BlockSparseAttentionParams;

constexpr int64_t kPieceGroups = 64;  // groups of 32 keys that one task attends to, of few tiles
constexpr int32_t kFirstToken = 0;

struct Work {
  QueryTile tile;
  int64_t decision;  // batch * Hd + deciding head
  int32_t kept;      // tokens of the context
  int32_t tail;      // tokens of the tail that the last query sees
};

struct Runs {
  const int32_t *starts, *sums;
  int64_t n, tokens;
};

class Attend {
 public:
  explicit Attend(const Params& p) : p_(p), row_floats_(p.Dv + 2) {
    for (int64_t b = 0; b < p.B; ++b) {
      context_.push_back(context());
      tail_.push_back(tail(b));
    }
    kernels_ = choose_kernels(context_[0]);
    scratch_ = std::max(kernels_.prefill->scratch_bytes(context_[0]),
                        kernels_.decode->scratch_bytes(context_[0]));
    make_tiles();
  }

  void run() const {
    static_cast<int64_t>(tiles_.size()) >= kSplitBelow ? run_whole() : run_split();
  }

 private:
  Attention base() const {
    Attention a{};
    a.query = p_.query, a.out = p_.out, a.lse = p_.lse;
    a.B = p_.B, a.Hq = p_.Hq, a.Hkv = p_.Hkv, a.Hi = 1;
    a.Tq = p_.Tq, a.D = p_.D, a.Dv = p_.Dv;
    a.q_block = a.kv_block = 1;
    a.scale = p_.scale, a.dtype = p_.dtype;
    const int64_t out[3] = {p_.Hq * p_.Tq * p_.Dv, p_.Tq * p_.Dv, p_.Dv};
    for (int i = 0; i < 3; ++i) a.query_stride[i] = p_.query_stride[i], a.out_stride[i] = out[i];
    return a;
  }

  Attention context() const {
    Attention a = base();
    a.key = p_.key, a.value = p_.value, a.Tk = p_.Tk;
    for (int i = 0; i < 3; ++i)
      a.key_stride[i] = p_.key_stride[i], a.value_stride[i] = p_.value_stride[i];
    return a;
  }

  Attention tail(int64_t batch) const {
    Attention a = base();
    a.key = p_.tail_key, a.value = p_.tail_value, a.causal = true;
    a.Tk = p_.tail_lengths == nullptr ? p_.N : p_.tail_lengths[batch];
    for (int i = 0; i < 3; ++i)
      a.key_stride[i] = p_.tail_key_stride[i], a.value_stride[i] = p_.tail_value_stride[i];
    return a;
  }

  // Rows that share their runs, longest first, so that no thread is left with much at the end.
  void make_tiles() {
    const int64_t sharing = p_.Hq / p_.Hd, queries = std::min<int64_t>(kMaxRows, p_.Tq);
    const int64_t heads = std::clamp<int64_t>(kMaxRows / queries, 1, sharing);
    for (int64_t b = 0; b < p_.B; ++b)
      for (int64_t d = 0; d < p_.Hd; ++d) {
        const int64_t n = count(b * p_.Hd + d), end = (d + 1) * sharing, Tk = tail_[b].Tk;
        const int32_t kept = n == 0 ? 0 : sums(b * p_.Hd + d)[n - 1];
        for (int64_t h = d * sharing; h < end; h += heads)
          for (int64_t q = 0; q < p_.Tq; q += queries) {
            const QueryTile t{b, h / (p_.Hq / p_.Hkv), h, std::min(heads, end - h), q,
                              std::min(queries, p_.Tq - q)};
            const int64_t seen = std::clamp<int64_t>(Tk - p_.Tq + q + t.queries, 0, Tk);
            tiles_.push_back({t, b * p_.Hd + d, kept, static_cast<int32_t>(seen)});
          }
      }
    const auto tokens = [](const Work& w) { return int64_t{w.kept} + w.tail; };
    std::stable_sort(tiles_.begin(), tiles_.end(),
                     [&](const Work& a, const Work& b) { return tokens(a) > tokens(b); });
  }

  const int32_t* row_of(const int32_t* base, const int64_t (&stride)[2], int64_t decision) const {
    return base + decision / p_.Hd * stride[0] + decision % p_.Hd * stride[1];
  }
  const int32_t* starts(int64_t d) const { return row_of(p_.starts, p_.starts_stride, d); }
  const int32_t* sums(int64_t d) const { return row_of(p_.sums, p_.sums_stride, d); }
  int32_t count(int64_t d) const { return *row_of(p_.counts, p_.counts_stride, d); }

  // Both lists of a tile: its kept runs, and the one run of the tail, which is causal besides.
  Runs runs(const Work& w, bool in_tail) const {
    if (in_tail) return {&kFirstToken, &w.tail, w.tail > 0, w.tail};
    return {starts(w.decision), sums(w.decision), count(w.decision), w.kept};
  }

  struct State {
    Buffer scratch;
    KeyGroups groups;
  };

  State state() const { return {allocate(scratch_), {}}; }

  // Tokens [from, to) of one list.
  void attend(const Work& w, bool in_tail, int64_t from, int64_t to, State& own,
              float* partial) const {
    const Runs r = runs(w, in_tail);
    own.groups.build_runs(r.starts, r.sums, r.n, from, to);
    const Attention& a = (in_tail ? tail_ : context_)[w.tile.batch];
    const AttentionKernel* kernel =
        w.tile.rows() <= kernels_.decode_rows ? kernels_.decode : kernels_.prefill;
    kernel->tile(a, w.tile, own.groups.data(), own.groups.size(), nullptr, own.scratch.get(),
                 partial);
  }

  void join(const Work& w, const std::vector<float*>& parts, float* sum) const {
    std::vector<const float*> of_row(parts.size());
    for (int64_t r = 0; r < w.tile.rows(); ++r) {
      for (size_t s = 0; s < parts.size(); ++s) of_row[s] = parts[s] + r * row_floats_;
      combine_row(context_[0], of_row.data(), static_cast<int64_t>(parts.size()), w.tile.batch,
                  w.tile.head + r / w.tile.queries, w.tile.query + r % w.tile.queries, sum);
    }
  }

  int64_t partial_floats(const Work& w) const { return w.tile.rows() * row_floats_; }

  // Many tiles: each by one thread.
  void run_whole() const {
    struct Own {
      State state;
      Buffer partials;
      std::vector<float> sum;
    };
    const int64_t most = kMaxRows * row_floats_;
    const auto make = [&] {
      return Own{state(), allocate(2 * most * static_cast<int64_t>(sizeof(float))),
                 std::vector<float>(p_.Dv)};
    };
    deal(static_cast<int64_t>(tiles_.size()), make, [&](int64_t i, Own& own) {
      const std::vector<float*> parts{floats(own.partials), floats(own.partials) + most};
      for (int part = 0; part < 2; ++part)
        attend(tiles_[i], part == 1, 0, runs(tiles_[i], part == 1).tokens, own.state, parts[part]);
      join(tiles_[i], parts, own.sum.data());
    });
  }

  // Few tiles: each is split over its keys, in pieces that depend on the lists alone, so that the
  // number of threads never changes a bit.
  void run_split() const {
    const auto n = static_cast<int64_t>(tiles_.size());
    struct Piece {
      int64_t tile, from, to;
      bool in_tail;
      int64_t kv_head, position;  // batches counted through; of the first token
    };
    std::vector<Piece> pieces;
    std::vector<int64_t> first(n + 1), place{0};
    for (int64_t i = 0; i < n; ++i) {
      for (int part = 0; part < 2; ++part) {
        const Runs list = runs(tiles_[i], part == 1);
        const int64_t tokens = list.tokens, size = (tokens + kGroupKeys - 1) / kGroupKeys;
        const int64_t splits = (size + kPieceGroups - 1) / kPieceGroups;
        for (int64_t s = 0; s < splits; ++s) {
          const int64_t from = size * s / splits * kGroupKeys;
          const int64_t to = std::min(tokens, size * (s + 1) / splits * kGroupKeys);
          const int64_t r = std::upper_bound(list.sums, list.sums + list.n, from) - list.sums;
          const QueryTile& t = tiles_[i].tile;
          pieces.push_back({i, from, to, part == 1, t.batch * p_.Hkv + t.kv_head, list.starts[r]});
          place.push_back(place.back() + partial_floats(tiles_[i]));
        }
      }
      first[i + 1] = static_cast<int64_t>(pieces.size());
    }
    // Heads of a group keep many of the same clusters: whoever comes next finds them in the cache.
    std::vector<int64_t> order(pieces.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      const auto key = [&](const Piece& s) { return std::tuple(s.kv_head, s.in_tail, s.position); };
      return key(pieces[a]) < key(pieces[b]);
    });
    const Buffer partials = allocate(place.back() * static_cast<int64_t>(sizeof(float)));
    deal(static_cast<int64_t>(pieces.size()), [&] { return state(); }, [&](int64_t i, State& own) {
      const Piece& s = pieces[order[i]];
      attend(tiles_[s.tile], s.in_tail, s.from, s.to, own, floats(partials) + place[order[i]]);
    });
    deal(n, [&] { return std::vector<float>(p_.Dv); }, [&](int64_t i, std::vector<float>& sum) {
      std::vector<float*> parts;
      for (int64_t s = first[i]; s < first[i + 1]; ++s) parts.push_back(floats(partials) + place[s]);
      join(tiles_[i], parts, sum.data());
    });
  }

  const Params& p_;
  const int64_t row_floats_;
  std::vector<Attention> context_, tail_;  // per sequence
  Kernels kernels_;
  int64_t scratch_ = 0;
  std::vector<Work> tiles_;
};

// Reads every list before anything is computed from it.
void check_lists(const Params& p) {
  for (int64_t i = 0; i < p.B * p.Hd; ++i) {
    const int64_t b = i / p.Hd, d = i % p.Hd;
    const int32_t n = p.counts[b * p.counts_stride[0] + d * p.counts_stride[1]];
    const std::string at = "[" + std::to_string(b) + ", " + std::to_string(d) + "]";
    SA_CHECK(n >= 0 && n <= p.runs, "counts: the value at ", at,
             " is negative or larger than the capacity of starts, ", p.runs);
    const int32_t* starts = p.starts + b * p.starts_stride[0] + d * p.starts_stride[1];
    const int32_t* sums = p.sums + b * p.sums_stride[0] + d * p.sums_stride[1];
    int64_t end = 0, total = 0;
    bool legal = true;
    for (int32_t r = 0; r < n; ++r) {
      legal = legal && starts[r] >= end && sums[r] > total;
      end = int64_t{starts[r]} + sums[r] - total;
      total = sums[r];
    }
    SA_CHECK(legal && end <= p.Tk, "starts, sums: runs at ", at,
             " must be ascending, disjoint, not empty and within the ", p.Tk, " tokens of key");
  }
  for (int64_t b = 0; p.tail_lengths != nullptr && b < p.B; ++b)
    SA_CHECK(p.tail_lengths[b] >= 0 && p.tail_lengths[b] <= p.N, "tail_lengths: got ",
             p.tail_lengths[b], ", expected 0 to ", p.N);
}

std::tuple<Tensor, Tensor> squeezed_attend(Tensor query, Tensor key, Tensor value, Tensor tail_key,
                                           Tensor tail_value, Tensor starts, Tensor sums,
                                           Tensor counts, std::optional<Tensor> tail_lengths,
                                           std::optional<double> scale) {
  check_squeezed_attend(query, key, value, tail_key, tail_value, starts, sums, counts,
                        tail_lengths ? &*tail_lengths : nullptr, scale);
  for (Tensor* t : {&query, &key, &value, &tail_key, &tail_value, &starts, &sums}) {
    SA_CHECK(t->is_cpu(), "query, key, value, runs: expected CPU tensors");
    *t = last_dim_contiguous(*t);
  }
  SA_CHECK(counts.is_cpu(), "counts: expected a CPU tensor");
  if (tail_lengths) {
    SA_CHECK(tail_lengths->is_cpu(), "tail_lengths: expected a CPU tensor");
    tail_lengths = last_dim_contiguous(*tail_lengths);
  }
  Params p = squeezed_attend_params(query, key, value, tail_key, tail_value, starts, sums, counts,
                                    tail_lengths ? &*tail_lengths : nullptr, scale);
  Tensor out = torch::stable::new_empty(query, {p.B, p.Hq, p.Tq, p.Dv});
  Tensor lse = torch::stable::new_empty(query, {p.B, p.Hq, p.Tq}, ScalarType::Float);
  p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr<float>();
  check_lists(p);
  Attend(p).run();
  return {out, lse};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) { m.impl("squeezed_attend.cpp", TORCH_BOX(&squeezed_attend)); }

}  // namespace sparse_attn
