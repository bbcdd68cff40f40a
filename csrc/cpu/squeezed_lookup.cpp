// Driver: scores of clusters, their softmax, the test against the threshold, runs.
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/squeezed_lookup.h"
#include "cpu_isa.h"
#include "squeezed_lookup.h"
#include "threads.h"

namespace sparse_attn {
namespace {

using Params = SqueezedLookupParams;

constexpr int64_t kPiece = 1024;     // clusters scored by one task of a decoding step
constexpr int64_t kChunkRows = 64;   // rows whose shares one task adds up, at least
constexpr int64_t kChunks = 16;      // such tasks per deciding head, at most
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const LookupKernel& choose_kernel(const Params& p) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512bf16 && p.dtype == DType::bf16) return kLookupAvx512Bf16;
  if (isa >= CpuIsa::avx512) return kLookupAvx512;
  if (isa == CpuIsa::avx2) return kLookupAvx2;
#endif
  return kLookupPortable;
}

// Decides for every head which clusters of one level are kept, and hands each decision on:
// done(decision, kept [K]).
class Level {
 public:
  // `alive` [B, Hd, K] or null: clusters that take part
  Level(const Params& p, const SqueezedLevel& level, const std::vector<uint8_t>* alive)
      : p_(p), level_(level), kernel_(choose_kernel(p)), alive_(alive), K_(level.K),
        padded_(round_up(level.K, 32)), decisions_(p.B * p.Hd), group_(p.Hq / p.Hkv),
        rows_(p.Tq * (p.Hq / p.Hd)) {}

  template <class Done>
  void decide(Done done) const {
    rows_ == 1 ? decide_by_one_row(done) : decide_by_mean(done);
  }

 private:
  struct State {
    Buffer scratch, floats;  // floats: [kernel rows][padded_], then weights [padded_]
  };

  struct Verdict {
    explicit Verdict(int64_t n) : weights_(n), kept_(n), weights(weights_.data()),
                                  kept(kept_.data()) {}
    std::vector<float> weights_;
    std::vector<uint8_t> kept_;
    float* weights;
    uint8_t* kept;
  };

  State state() const {
    return {allocate(kernel_.scratch_bytes(p_)),
            allocate((kernel_.rows + 1) * padded_ * static_cast<int64_t>(sizeof(float)))};
  }

  int64_t kv_head(int64_t decision) const { return decision % p_.Hd * p_.Hkv / p_.Hd; }

  const char* centroids(int64_t batch, int64_t kv) const {
    return element(p_.dtype, level_.centroids, level_.centroids_stride, batch, kv, 0);
  }

  const char* query(int64_t batch, int64_t head, int64_t row) const {
    return element(p_.dtype, p_.query, p_.query_stride, batch, head, row);
  }

  // log of the keys per cluster, -inf for what takes no part; `buffer` holds what must be made
  const float* weights(int64_t decision, float* buffer) const {
    const int64_t b = decision / p_.Hd, kv = kv_head(decision);
    const float* log_counts =
        level_.log_counts + b * level_.log_counts_stride[0] + kv * level_.log_counts_stride[1];
    if (alive_ == nullptr) return log_counts;
    const uint8_t* alive = alive_->data() + decision * K_;
    for (int64_t j = 0; j < K_; ++j) buffer[j] = alive[j] ? log_counts[j] : -kInfinity;
    return buffer;
  }

  // Per group of 32 clusters whether one of the decisions from `first` on needs a score of it.
  const uint8_t* needed(int64_t first, int64_t count, std::vector<uint8_t>& groups) const {
    if (alive_ == nullptr) return nullptr;
    groups.assign(padded_ / 32, 0);
    for (int64_t d = first; d < first + count; ++d)
      for (int64_t j = 0; j < K_; ++j) groups[j / 32] |= (*alive_)[d * K_ + j];
    return groups.data();
  }

  ScoreTask task(int64_t batch, int64_t kv, int64_t begin, int64_t end) const {
    ScoreTask t{};
    t.centroids = centroids(batch, kv);
    t.stride = level_.centroids_stride[2] * element_bytes(p_.dtype);
    t.begin = begin, t.end = end;
    return t;
  }

  // One row per head: s > t in the log domain, without a second pass. Query heads of a KV head
  // are scored together.
  template <class Done>
  void decide_by_one_row(Done done) const {
    const int64_t pieces = (K_ + kPiece - 1) / kPiece;
    const int64_t blocks = (group_ + kernel_.rows - 1) / kernel_.rows;
    const Buffer logits = allocate(p_.B * p_.Hq * padded_ * static_cast<int64_t>(sizeof(float)));
    deal(p_.B * p_.Hkv * blocks * pieces,
         [&] { return std::pair{allocate(kernel_.scratch_bytes(p_)), std::vector<uint8_t>()}; },
         [&](int64_t i, auto& state) {
           const int64_t piece = i % pieces, block = i / pieces % blocks;
           const int64_t kv = i / pieces / blocks % p_.Hkv, b = i / pieces / blocks / p_.Hkv;
           const int64_t first = kv * group_ + block * kernel_.rows;
           const int64_t n = std::min<int64_t>(kernel_.rows, (kv + 1) * group_ - first);
           ScoreTask t = task(b, kv, piece * kPiece, std::min(K_, (piece + 1) * kPiece));
           t.needed = needed(b * p_.Hd + first, n, state.second);
           t.n_rows = static_cast<int>(n);
           float* to[kLookupRowsMax] = {};
           for (int64_t r = 0; r < n; ++r) {
             t.rows[r] = query(b, first + r, 0);
             to[r] = floats(logits) + (b * p_.Hq + first + r) * padded_;
           }
           kernel_.score(p_, t, state.first.get(), to);
         });
    deal(decisions_, [&] { return Verdict(padded_); }, [&](int64_t d, Verdict& v) {
           float* x = floats(logits) + d * padded_;
           const float* w = weights(d, v.weights);
           const float total = kernel_.log_sum(x, w, K_), t = *level_.threshold;
           const bool all = !std::isfinite(total) || !(t > 0);
           const float least = all ? 0 : std::log(t) + total;
           for (int64_t j = 0; j < K_; ++j)
             v.kept[j] = (w[j] != -kInfinity) & (all | (x[j] > least));
           done(d, v.kept);
         });
  }

  // Several rows per head: the mean of their shares. Rows are cut by the shapes alone, so that
  // the number of threads never changes a bit.
  template <class Done>
  void decide_by_mean(Done done) const {
    const int64_t least = std::max(kChunkRows, (rows_ + kChunks - 1) / kChunks);
    const int64_t step = round_up(least, kLookupRowsMax), chunks = (rows_ + step - 1) / step;
    const Buffer totals =
        allocate(decisions_ * chunks * padded_ * static_cast<int64_t>(sizeof(float)));
    deal(decisions_ * chunks,
         [&] { return std::pair{state(), std::vector<uint8_t>()}; },
         [&](int64_t i, auto& own) {
           const int64_t d = i / chunks, begin = i % chunks * step;
           float* total = floats(totals) + i * padded_;
           std::fill(total, total + padded_, 0.0f);
           add_rows(d, begin, std::min(rows_, begin + step), own.first,
                    needed(d, 1, own.second), total);
         });
    deal(decisions_, [&] { return Verdict(padded_); }, [&](int64_t d, Verdict& v) {
           float* sum = floats(totals) + d * chunks * padded_;
           for (int64_t c = 1; c < chunks; ++c)
             for (int64_t j = 0; j < K_; ++j) sum[j] += sum[c * padded_ + j];
           const float* w = weights(d, v.weights);
           const float t = *level_.threshold, n = static_cast<float>(rows_);
           for (int64_t j = 0; j < K_; ++j)
             v.kept[j] = (w[j] != -kInfinity) & (!(sum[j] / n <= t) | (t <= 0));
           done(d, v.kept);
         });
  }

  void add_rows(int64_t d, int64_t begin, int64_t end, const State& own, const uint8_t* groups,
                float* total) const {
    const int64_t b = d / p_.Hd, heads = p_.Hq / p_.Hd;
    float* const logits = floats(own.floats);
    const float* w = weights(d, logits + kernel_.rows * padded_);
    for (int64_t row = begin; row < end; row += kernel_.rows) {
      ScoreTask t = task(b, kv_head(d), 0, K_);
      t.needed = groups;
      t.n_rows = static_cast<int>(std::min<int64_t>(kernel_.rows, end - row));
      float* to[kLookupRowsMax] = {};
      for (int r = 0; r < t.n_rows; ++r) {
        t.rows[r] = query(b, d % p_.Hd * heads + (row + r) / p_.Tq, (row + r) % p_.Tq);
        to[r] = logits + r * padded_;
      }
      kernel_.score(p_, t, own.scratch.get(), to);
      for (int r = 0; r < t.n_rows; ++r) {
        const float sum = kernel_.log_sum(to[r], w, K_);
        if (std::isfinite(sum))
          kernel_.add_shares(to[r], K_, sum, total);
        else
          std::fill(total, total + K_, kInfinity);
      }
    }
  }

  const Params& p_;
  const SqueezedLevel& level_;
  const LookupKernel& kernel_;
  const std::vector<uint8_t>* alive_;
  const int64_t K_, padded_, decisions_, group_, rows_;
};

// Reads every list of children before anything is marked by them.
void check_children(const Params& p, int64_t contexts) {
  for (int64_t i = 0; i < contexts * p.Hkv; ++i) {
    const int32_t* at = p.coarse.offsets + i / p.Hkv * p.coarse.offsets_stride[0] +
                        i % p.Hkv * p.coarse.offsets_stride[1];
    bool legal = at[0] == 0 && at[p.coarse.K] == p.fine.K;
    for (int64_t j = 0; j < p.coarse.K; ++j) legal = legal && at[j] <= at[j + 1];
    SA_CHECK(legal, "children: rows must ascend from 0 to the number of centroids");
  }
}

// Marks the clusters of a decision whose parents were kept.
void mark_children(const Params& p, int64_t d, const uint8_t* parents, uint8_t* alive) {
  const int32_t* at = p.coarse.offsets + d / p.Hd * p.coarse.offsets_stride[0] +
                      d % p.Hd * p.Hkv / p.Hd * p.coarse.offsets_stride[1];
  for (int64_t i = 0; i < p.coarse.K; ++i)
    if (parents[i]) std::fill(alive + at[i], alive + at[i + 1], 1);
}

// Kept clusters of a decision as runs of tokens; those that touch are one. False if offsets do
// not ascend from 0.
bool write_runs(const Params& p, int64_t d, const uint8_t* kept) {
  const int32_t* at = p.fine.offsets + d / p.Hd * p.fine.offsets_stride[0] +
                      d % p.Hd * p.Hkv / p.Hd * p.fine.offsets_stride[1];
  int32_t *starts = p.starts + d * p.runs, *sums = p.sums + d * p.runs;
  int32_t count = 0, tokens = 0, end = -1;
  bool ascending = at[0] == 0;
  for (int64_t j = 0; j < p.fine.K; ++j) ascending &= at[j] <= at[j + 1];
  for (int64_t j = 0; ascending && j < p.fine.K; ++j) {
    if (!kept[j] || at[j] == at[j + 1]) continue;
    if (at[j] != end) starts[count++] = at[j];
    end = at[j + 1];
    tokens += end - at[j];
    sums[count - 1] = tokens;
  }
  std::fill(starts + count, starts + p.runs, 0);
  std::fill(sums + count, sums + p.runs, 0);
  p.counts[d] = count;
  p.tokens[d] = tokens;
  return ascending;
}

// A decoding step and the input of a prompt alike: one or two levels, then the runs.
void look_up(const Params& p, bool two) {
  std::vector<uint8_t> alive(two ? p.B * p.Hd * p.fine.K : 0);
  if (two)
    Level(p, p.coarse, nullptr).decide([&](int64_t d, const uint8_t* parents) {
      mark_children(p, d, parents, alive.data() + d * p.fine.K);
    });
  std::atomic<bool> legal{true};
  Level(p, p.fine, two ? &alive : nullptr).decide([&](int64_t d, const uint8_t* kept) {
    if (!write_runs(p, d, kept)) legal = false;
  });
  SA_CHECK(legal, "offsets: rows must ascend from 0");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> squeezed_lookup(
    Tensor query, Tensor centroids, Tensor log_counts, Tensor offsets, Tensor threshold,
    std::optional<Tensor> coarse_centroids, std::optional<Tensor> coarse_log_counts,
    std::optional<Tensor> children, std::optional<Tensor> coarse_threshold, bool shared,
    std::optional<double> scale) {
  const bool two = coarse_centroids && coarse_log_counts && children && coarse_threshold;
  SA_CHECK(two || !(coarse_centroids || coarse_log_counts || children || coarse_threshold),
           "coarse_centroids: all four coarse arguments or none");
  for (const Tensor* t : {&query, &centroids, &log_counts, &offsets, &threshold})
    SA_CHECK(t->is_cpu(), "query, centroids: expected CPU tensors");
  query = last_dim_contiguous(query);
  const LevelTensors fine{last_dim_contiguous(centroids), last_dim_contiguous(log_counts),
                          last_dim_contiguous(offsets), threshold, "centroids", "offsets"};
  LevelTensors coarse = fine;
  if (two)
    coarse = {last_dim_contiguous(*coarse_centroids), last_dim_contiguous(*coarse_log_counts),
              last_dim_contiguous(*children), *coarse_threshold, "coarse_centroids", "children"};
  for (const Tensor* t : {&coarse.centroids, &coarse.log_counts, &coarse.offsets, &coarse.threshold})
    SA_CHECK(t->is_cpu(), "coarse_centroids: expected CPU tensors");
  Params p = squeezed_lookup_params(query, fine, two ? &coarse : nullptr, shared, scale);
  if (two) check_children(p, fine.centroids.size(0));
  const auto make = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(query, shape, ScalarType::Int);
  };
  Tensor starts = make({p.B, p.Hd, p.runs}), sums = make({p.B, p.Hd, p.runs});
  Tensor counts = make({p.B, p.Hd}), tokens = make({p.B, p.Hd});
  p.starts = starts.mutable_data_ptr<int32_t>(), p.sums = sums.mutable_data_ptr<int32_t>();
  p.counts = counts.mutable_data_ptr<int32_t>(), p.tokens = tokens.mutable_data_ptr<int32_t>();
  look_up(p, two);
  return {starts, sums, counts, tokens};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) { m.impl("squeezed_lookup.cpp", TORCH_BOX(&squeezed_lookup)); }

}  // namespace sparse_attn
