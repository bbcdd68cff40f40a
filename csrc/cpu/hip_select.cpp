// HiP's tree search: sparse_attn/reference/hip_select.py says what it chooses.
#include <numeric>
#include <tuple>

#include "hip_voters.h"

namespace sparse_attn {
namespace {

using Params = HipSelectParams;

// A chunk of blocks that is still in the search, and what is known of its representative.
struct Node {
  int32_t begin, length;
  int32_t representative;  // -1: not scored yet
  float score;
};

class Search {
 public:
  Search(const Params& p, const HipScoreKernel& kernel)
      : p_(p), kernel_(kernel), voters_(p, kernel, group() * sampled()) {
    blocks_.resize(p.K);
  }

  void run(const HipTask& t) {
    const int64_t start = p_.sink / p_.kv_block;
    const int64_t end = (hip_end(p_, t) + p_.kv_block - 1) / p_.kv_block;
    const int64_t n = std::min(p_.keep, std::max<int64_t>(end - start, 0));
    if (end - start <= p_.keep) {
      std::iota(blocks_.begin(), blocks_.begin() + n, static_cast<int32_t>(start));
    } else {
      voters_.gather(t, t.head * group(), group(), p_.q_stride);
      keys_ = hip_keys(p_, t.batch, t.head * group() / (p_.Hq / p_.Hkv));
      descend(start, end);
      for (int64_t i = 0; i < n; ++i) blocks_[i] = nodes_[i].begin;
    }
    write_hip_row(p_, t, blocks_.data(), n);
  }

 private:
  int64_t group() const { return p_.Hq / p_.H; }
  int64_t sampled() const { return (p_.q_block + p_.q_stride - 1) / p_.q_stride; }

  // a budget for all keys never comes here, and needs no room for its many nodes
  void make_room() {
    const int64_t most = p_.keep * p_.branch;
    nodes_.resize(p_.keep), children_.resize(most);
    values_.resize(most), ranks_.resize(most), places_.resize(most + 1);
  }

  void descend(int64_t start, int64_t end) {
    const int64_t keep = p_.keep, blocks = end - start;
    make_room();
    for (int64_t j = 0; j < keep; ++j) {
      const int64_t from = start + j * blocks / keep, to = start + (j + 1) * blocks / keep;
      nodes_[j] = {static_cast<int32_t>(from), static_cast<int32_t>(to - from), -1, 0};
    }
    for (int64_t longest = (blocks + keep - 1) / keep; longest > 1;
         longest = (longest + p_.branch - 1) / p_.branch) {
      const int64_t n = split();
      score(n);
      if (n <= keep) {  // every chunk is one block already
        std::copy(children_.begin(), children_.begin() + n, nodes_.begin());
        continue;
      }
      for (int64_t i = 0; i < n; ++i) values_[i] = children_[i].score;
      kernel_.keep_best(values_.data(), n, keep, ranks_.data(), places_.data());
      for (int64_t i = 0; i < keep; ++i) nodes_[i] = children_[places_[i]];
    }
  }

  // The children of all nodes, in order. One that keeps its parent's representative keeps its score.
  int64_t split() {
    int64_t n = 0;
    for (const Node& node : nodes_) {
      int32_t from = 0;
      for (int64_t i = 1; i <= p_.branch; ++i) {
        const auto to = static_cast<int32_t>(i * node.length / p_.branch);
        if (to == from) continue;
        const int32_t begin = node.begin + from, length = to - from;
        const int32_t representative = p_.centre ? begin + length / 2 : begin;
        const bool known = representative == node.representative;
        children_[n++] = {begin, length, known ? representative : -1 - representative, node.score};
        from = to;
      }
    }
    return n;
  }

  void score(int64_t n) {
    tokens_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (children_[i].representative < 0)
        for (int64_t k = 0; k < p_.kv_block; k += p_.key_step)
          tokens_.push_back(
              static_cast<int32_t>((-1 - children_[i].representative) * p_.kv_block + k));
    scores_.resize(tokens_.size());
    voters_.score(keys_, tokens_.data(), static_cast<int64_t>(tokens_.size()), scores_.data());
    const int64_t each = (p_.kv_block + p_.key_step - 1) / p_.key_step;
    const float* of = scores_.data();
    for (int64_t i = 0; i < n; ++i) {
      Node& child = children_[i];
      if (child.representative >= 0) continue;
      child.representative = -1 - child.representative;
      child.score = *std::max_element(of, of + each);
      of += each;
    }
  }

  const Params& p_;
  const HipScoreKernel& kernel_;
  HipPacked voters_;
  HipKeys keys_{};
  std::vector<Node> nodes_, children_;
  std::vector<float> values_, scores_;
  std::vector<int32_t> ranks_, places_, tokens_, blocks_;
};

std::tuple<Tensor, Tensor> hip_select(Tensor query, Tensor key, int64_t budget, int64_t q_block,
                                      int64_t kv_block, int64_t q_stride, int64_t key_stride,
                                      int64_t sink, int64_t window, std::string representative,
                                      int64_t branch, bool share_kv_heads, bool causal,
                                      std::optional<double> scale,
                                      std::optional<Tensor> block_table,
                                      std::optional<Tensor> kv_lengths) {
  Params p{};
  std::tie(query, key) = hip_inputs(p, query, key, q_block, kv_block, sink, window, representative,
                                    causal, scale, block_table, kv_lengths);
  set_hip_search(p, budget, q_stride, key_stride, branch, share_kv_heads);
  auto [indices, counts] = empty_hip_index(p, query);
  const HipScoreKernel& kernel = choose_hip_kernel(p);
  deal(p.B * p.H * p.Mq, [&] { return Search(p, kernel); },
       [&](int64_t i, Search& search) { search.run(hip_task(p, i)); });
  return {indices, counts};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) { m.impl("hip_select.cpp", TORCH_BOX(&hip_select)); }

}  // namespace sparse_attn
