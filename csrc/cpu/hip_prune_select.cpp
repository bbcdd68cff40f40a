// InfiniteHiP's stages: sparse_attn/reference/hip_prune_select.py says what they choose.
#include <limits>
#include <tuple>

#include "hip_voters.h"

namespace sparse_attn {
namespace {

using Params = HipPruneParams;

constexpr int64_t kScanned = 8;   // chunks of at most so many keys are scored by all of them
constexpr int64_t kTogether = 1024;  // chunks that descend side by side

struct Chunk {
  int32_t first, last;  // keys [first, last)
};

class Pruner {
 public:
  Pruner(const Params& p, const HipScoreKernel& kernel)
      : p_(p), kernel_(kernel), voters_(p, kernel, p.q_block) {}

  void run(const HipTask& t) {
    const int64_t block = p_.chunk[p_.stages - 1];
    start_ = p_.sink / block * block, end_ = hip_end(p_, t);
    ids_.clear();
    if (end_ > start_)
      for (int64_t j = start_ / p_.chunk[0]; j * p_.chunk[0] < end_; ++j)
        ids_.push_back(static_cast<int32_t>(j));
    for (int64_t i = 0; i < p_.stages; ++i) {
      if (i > 0) split(p_.chunk[i - 1], p_.chunk[i]);
      prune(t, i);
    }
    write_hip_row(p_, t, ids_.data(), static_cast<int64_t>(ids_.size()));
  }

 private:
  void split(int64_t from, int64_t to) {
    next_.clear();
    for (int64_t id : ids_)
      for (int64_t j = id * (from / to); j < (id + 1) * (from / to); ++j)
        if ((j + 1) * to > start_ && j * to < end_) next_.push_back(static_cast<int32_t>(j));
    ids_.swap(next_);
  }

  void prune(const HipTask& t, int64_t stage) {
    const int64_t n = static_cast<int64_t>(ids_.size()), keep = p_.keep[stage];
    if (n <= keep) return;
    best_.assign(n, -std::numeric_limits<float>::infinity());
    const int64_t heads = p_.Hq / p_.H;
    for (int64_t h = t.head * heads; h < (t.head + 1) * heads; ++h) {
      voters_.gather(t, h, 1, p_.q_stride[stage]);
      keys_ = hip_keys(p_, t.batch, h / (p_.Hq / p_.Hkv));
      for (int64_t from = 0; from < n; from += kTogether) {
        place(from, std::min(n, from + kTogether), p_.chunk[stage]);
        if (p_.chunk[stage] <= kScanned) scan(&best_[from]);
        else descend(p_.chunk[stage], &best_[from]);
      }
    }
    ranks_.resize(n), places_.resize(n + 1);
    kernel_.keep_best(best_.data(), n, keep, ranks_.data(), places_.data());
    for (int64_t i = 0; i < keep; ++i) ids_[i] = ids_[places_[i]];  // ascending: never overtaken
    ids_.resize(keep);
  }

  void place(int64_t from, int64_t to, int64_t size) {
    chunks_.clear();
    for (int64_t i = from; i < to; ++i)
      chunks_.push_back({static_cast<int32_t>(std::max(ids_[i] * size, start_)),
                         static_cast<int32_t>(std::min((ids_[i] + 1) * size, end_))});
  }

  // Raises the scores of the placed chunks to the best of all their keys.
  void scan(float* best) {
    tokens_.clear();
    for (const Chunk& c : chunks_)
      for (int32_t k = c.first; k < c.last; ++k) tokens_.push_back(k);
    score();
    const float* of = scores_.data();
    for (const Chunk& c : chunks_) {
      *best = std::max(*best, *std::max_element(of, of + (c.last - c.first)));
      of += c.last - c.first, ++best;
    }
  }

  // Raises the scores of the placed chunks to the best of the keys met on the way down. With "first"
  // a left half is judged by its parent's key, whose score is known from the second level on.
  void descend(int64_t size, float* best) {
    const size_t n = chunks_.size();
    parents_.resize(n);
    bool known = false;
    for (int64_t longest = size; longest > 1; longest = (longest + 1) / 2) {
      tokens_.clear();
      for (const Chunk& c : chunks_) {
        const int32_t middle = c.first + (c.last - c.first) / 2;
        if (!known) tokens_.push_back(p_.centre ? c.first + (middle - c.first) / 2 : c.first);
        tokens_.push_back(p_.centre ? middle + (c.last - middle) / 2 : middle);
      }
      score();
      for (size_t i = 0; i < n; ++i) {
        Chunk& c = chunks_[i];
        const float left = known ? parents_[i] : scores_[2 * i];
        const float right = known ? scores_[i] : scores_[2 * i + 1];
        parents_[i] = std::max(left, right);
        best[i] = std::max(best[i], parents_[i]);
        const int32_t middle = c.first + (c.last - c.first) / 2;
        if (c.last - c.first > 1) (right > left ? c.first : c.last) = middle;
      }
      known = !p_.centre;
    }
  }

  void score() {
    scores_.resize(tokens_.size());
    voters_.score(keys_, tokens_.data(), static_cast<int64_t>(tokens_.size()), scores_.data());
  }

  const Params& p_;
  const HipScoreKernel& kernel_;
  HipPacked voters_;
  HipKeys keys_{};
  int64_t start_ = 0, end_ = 0;
  std::vector<int32_t> ids_, next_, tokens_, ranks_, places_;
  std::vector<float> best_, scores_, parents_;
  std::vector<Chunk> chunks_;
};

std::tuple<Tensor, Tensor> hip_prune_select(
    Tensor query, Tensor key, std::vector<int64_t> chunks, std::vector<int64_t> keeps,
    std::vector<int64_t> q_strides, int64_t q_block, int64_t sink, int64_t window,
    std::string representative, std::string merge_heads, bool causal, std::optional<double> scale,
    std::optional<Tensor> block_table, std::optional<Tensor> kv_lengths) {
  Params p{};
  SA_CHECK(!chunks.empty(), "chunks: expected one size per stage");
  std::tie(query, key) = hip_inputs(p, query, key, q_block, chunks.back(), sink, window,
                                    representative, causal, scale, block_table, kv_lengths);
  set_hip_stages(p, chunks, keeps, q_strides, merge_heads);
  auto [indices, counts] = empty_hip_index(p, query);
  const HipScoreKernel& kernel = choose_hip_kernel(p);
  deal(p.B * p.H * p.Mq, [&] { return Pruner(p, kernel); },
       [&](int64_t i, Pruner& pruner) { pruner.run(hip_task(p, i)); });
  return {indices, counts};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) { m.impl("hip_prune_select.cpp", TORCH_BOX(&hip_prune_select)); }

}  // namespace sparse_attn
