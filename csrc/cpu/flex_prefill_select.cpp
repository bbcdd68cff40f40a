// FlexPrefill's selection, variant "exact": sparse_attn/reference/flex_prefill_select.py says what.
#include "flex_prefill_select.h"

#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/flex_prefill_select.h"
#include "block_sparse_attention.h"
#include "cpu_isa.h"
#include "threads.h"

namespace sparse_attn {
namespace {

using Params = FlexPrefillParams;

const ProbeKernel& choose_kernel(const Params& p) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa == CpuIsa::amx && p.dtype == DType::bf16) return kProbeAmx;
  if (isa >= CpuIsa::avx512) return kProbeAvx512;
  if (isa == CpuIsa::avx2) return kProbeAvx2;
#endif
  return kProbePortable;
}

struct Options {
  float gamma, tau;
  int64_t low, high;  // blocks per direction
};

// The probe's attention of all heads, summed in the ways the selection needs.
class Profiles {
 public:
  Profiles(const Params& p, const ProbeKernel& kernel) : p_(p), kernel_(kernel) {
    heads_ = p.B * p.Hq;
    tiles_ = (p.Tk + kProbeKeys - 1) / kProbeKeys;
    vertical.resize(heads_ * p.Tk);
    columns.resize(heads_ * p.Tk);
    slash_stride_ = p.Tk + 3 * kProbeLanes;
    slash_.resize(heads_ * slash_stride_);
    diagonals_.resize(heads_ * slash_stride_);
    normalise();
    profile();
  }

  std::vector<float> vertical;  // [heads][Tk] mass per key
  std::vector<float> columns;   // [heads][Tk] of it, what a column of keys explains
  bool finite(int64_t head) const {
    const float* max = &max_[head * kProbeLanes];
    return std::all_of(max, max + p_.probe, [](float x) { return std::isfinite(x) && x > kNoKey; });
  }
  // mass per distance that a diagonal explains, from distance 0
  const float* diagonals(int64_t head) const { return at_zero(diagonals_, head); }

 private:
  ProbeTask task(int64_t i) const {
    const int64_t head = i / tiles_, begin = i % tiles_ * kProbeKeys;
    return {head / p_.Hq, head % p_.Hq, begin, std::min(p_.Tk, begin + kProbeKeys)};
  }

  // distances below 0 belong to keys a row may not see: room for them, always 0
  const float* at_zero(const std::vector<float>& x, int64_t head) const {
    return x.data() + head * slash_stride_ + kProbeLanes;
  }

  void normalise() {
    std::vector<float> max(heads_ * tiles_ * kProbeLanes), sum(max.size());
    each_task([&](int64_t i, const ProbeTask& t, void* scratch) {
      kernel_.extent(p_, t, scratch, &max[i * kProbeLanes], &sum[i * kProbeLanes]);
    });
    max_.resize(heads_ * kProbeLanes);
    weight_.resize(heads_ * kProbeLanes);
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t lane = 0; lane < kProbeLanes; ++lane) {
        float top = max[h * tiles_ * kProbeLanes + lane], total = 0;
        for (int64_t t = 1; t < tiles_; ++t)
          top = std::max(top, max[(h * tiles_ + t) * kProbeLanes + lane]);
        for (int64_t t = 0; t < tiles_; ++t) {
          const int64_t at = (h * tiles_ + t) * kProbeLanes + lane;
          total += sum[at] * std::exp2(max[at] - top);
        }
        max_[h * kProbeLanes + lane] = top;
        weight_[h * kProbeLanes + lane] =
            lane < p_.probe ? 1 / (total * static_cast<float>(p_.probe)) : 0;
      }
    }
  }

  void profile() {
    std::vector<float> parts(heads_ * tiles_ * kSlashLength);
    each_task([&](int64_t i, const ProbeTask& t, void* scratch) {
      kernel_.profile(p_, t, scratch, softmax(i / tiles_), &vertical[i / tiles_ * p_.Tk + t.begin],
                      &parts[i * kSlashLength]);
    });
    join(parts, slash_);
    std::vector<int32_t> own(kProbeLanes);
    for (int64_t r = 0; r < kProbeLanes; ++r) {
      const int64_t query = p_.Tq - p_.probe + std::min(r, p_.probe - 1);
      const int64_t first = p_.Tk - p_.Tq + query / p_.block * p_.block;
      own[r] = static_cast<int32_t>(std::max<int64_t>(first, 0) / p_.block * p_.block);
    }
    each_task([&](int64_t i, const ProbeTask& t, void* scratch) {
      const int64_t head = i / tiles_;
      kernel_.attribute(p_, t, scratch, softmax(head), &vertical[head * p_.Tk + t.begin],
                        at_zero(slash_, head), own.data(), &columns[head * p_.Tk + t.begin],
                        &parts[i * kSlashLength]);
    });
    join(parts, diagonals_);
  }

  // Adds up what the tiles of a head found for each distance, in a fixed order.
  void join(const std::vector<float>& parts, std::vector<float>& joined) const {
    deal(heads_, [] { return 0; }, [&](int64_t h, int) {
      float* to = joined.data() + h * slash_stride_ + kProbeLanes;
      for (int64_t t = 0; t < tiles_; ++t) {
        const ProbeTask piece = task(h * tiles_ + t);
        const int64_t base = first_distance(p_, piece);
        const float* from = &parts[(h * tiles_ + t) * kSlashLength];
        const int64_t length = piece.keys() + kProbeLanes;
        for (int64_t i = std::max<int64_t>(0, -base); i < length && base + i < p_.Tk; ++i)
          to[base + i] += from[i];
      }
    });
  }

  ProbeSoftmax softmax(int64_t head) const {
    return {&max_[head * kProbeLanes], &weight_[head * kProbeLanes]};
  }

  template <class Body>
  void each_task(Body body) const {
    deal(heads_ * tiles_, [&] { return allocate(kernel_.scratch_bytes(p_)); },
         [&](int64_t i, const Buffer& scratch) { body(i, task(i), scratch.get()); });
  }

  const Params& p_;
  const ProbeKernel& kernel_;
  int64_t heads_, tiles_, slash_stride_;
  std::vector<float> slash_, diagonals_, max_, weight_;
};

// Sums over blocks of `block`.
std::vector<float> block_sums(const float* x, int64_t n, int64_t block) {
  std::vector<float> sums((n + block - 1) / block);
  for (int64_t i = 0; i < n; ++i) sums[i / block] += x[i];
  return sums;
}

// Indices in descending order of value, ties by index.
std::vector<int32_t> ranking(const std::vector<float>& values) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  return order;
}

void softmax(std::vector<float>& x) {
  const float top = *std::max_element(x.begin(), x.end());
  float total = 0;
  for (float& v : x) total += v = std::exp(v - top);
  for (float& v : x) v /= total;
}

// Square root of the Jensen-Shannon divergence, natural log.
float divergence(const std::vector<float>& a, const std::vector<float>& b) {
  const auto term = [](float x, float m) { return x > 0 ? 0.5f * x * std::log(x / m) : 0.0f; };
  float sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float m = (a[i] + b[i]) / 2;
    sum += term(a[i], m) + term(b[i], m);
  }
  return std::sqrt(std::max(sum, 0.0f));  // rounding can leave equal distributions below 0
}

// The geometry of query blocks, which need not line up with blocks of keys.
struct Grid {
  int64_t Tq, Tk, block;

  int64_t rows() const { return (Tq + block - 1) / block; }
  int64_t blocks() const { return (Tk + block - 1) / block; }
  int64_t first(int64_t r) const { return Tk - Tq + r * block; }
  int64_t last(int64_t r) const { return std::min(first(r) + block, Tk) - 1; }
  int64_t visible(int64_t r) const { return last(r) < 0 ? 0 : last(r) / block + 1; }

  // blocks [from, to) of row r with a key at a distance in [bucket * block, (bucket + 1) * block)
  std::pair<int64_t, int64_t> touched(int64_t r, int64_t bucket) const {
    const int64_t high = last(r) - bucket * block, low = first(r) - (bucket + 1) * block + 1;
    if (high < 0) return {0, 0};
    return {std::max<int64_t>(low, 0) / block, high / block + 1};
  }
};

struct Choice {
  std::vector<int32_t> columns, buckets;
  std::vector<int32_t> at_probe;  // further blocks of the probe's rows
  bool query_aware = false;
};

// The fewest entries, heaviest first, that sum to gamma.
std::vector<int32_t> reaching(const std::vector<float>& mass, float gamma) {
  std::vector<int32_t> order = ranking(mass);
  float sum = 0;
  size_t n = 0;
  while (n < order.size() && sum < gamma) sum += mass[order[n++]];
  order.resize(n);
  return order;
}

Choice choose(const Params& p, const Options& options, const Profiles& profiles, int64_t head,
              const std::vector<float>& estimate) {
  const float* vertical = &profiles.vertical[head * p.Tk];
  const std::vector<float> columns = block_sums(&profiles.columns[head * p.Tk], p.Tk, p.block);
  const std::vector<float> buckets = block_sums(profiles.diagonals(head), p.Tk, p.block);
  const auto blocks = static_cast<int64_t>(columns.size());
  Choice choice;
  if (!profiles.finite(head) || !std::isfinite(estimate[0])) {
    choice.columns.resize(blocks);
    std::iota(choice.columns.begin(), choice.columns.end(), 0);
    return choice;
  }
  const std::vector<float> mass = block_sums(vertical, p.Tk, p.block);
  choice.query_aware = divergence(estimate, mass) < options.tau;
  // the estimate promises nothing: where the truth is known, the probe rows, keep that too
  if (choice.query_aware) choice.at_probe = reaching(mass, options.gamma);
  float paid = 0;
  for (float x : columns) paid += x;
  for (float x : buckets) paid += x;
  float reached = 1 - paid;  // the rest lies in blocks that are kept anyway
  std::vector<float> all = columns;
  all.insert(all.end(), buckets.begin(), buckets.end());
  int64_t n_columns = 0, n_buckets = 0;
  if (!choice.query_aware) {
    for (int32_t i : ranking(all)) {
      if (reached >= options.gamma) break;
      reached += all[i];
      ++(i < blocks ? n_columns : n_buckets);
    }
  }
  const auto clamp = [&](int64_t n) { return std::min(std::max(n, options.low), options.high); };
  choice.columns = ranking(columns);
  choice.buckets = ranking(buckets);
  choice.columns.resize(std::min(clamp(n_columns), blocks));
  choice.buckets.resize(std::min(clamp(n_buckets), blocks));
  return choice;
}

class Selector {
 public:
  Selector(const Params& p, const Options& options, const ProbeKernel& kernel)
      : p_(p), options_(options), kernel_(kernel), grid_{p.Tq, p.Tk, p.block} {}

  void run(int32_t* indices, int32_t* counts, int32_t* pattern) {
    const int64_t rows = grid_.rows(), blocks = grid_.blocks();
    if (options_.gamma >= 1) {
      for (int64_t i = 0; i < p_.B * p_.Hq * rows; ++i) {
        counts[i] = static_cast<int32_t>(grid_.visible(i % rows));
        std::iota(indices + i * blocks, indices + i * blocks + counts[i], 0);
        std::fill(indices + i * blocks + counts[i], indices + (i + 1) * blocks, 0);
      }
      std::fill(pattern, pattern + p_.B * p_.Hq, 0);
      return;
    }
    const Profiles profiles(p_, kernel_);
    mean_blocks();
    std::vector<Choice> choices(p_.B * p_.Hq);
    deal(p_.B * p_.Hq, [] { return 0; }, [&](int64_t head, int) {
      choices[head] = choose(p_, options_, profiles, head, estimate(head));
      pattern[head] = choices[head].query_aware;
    });
    deal(p_.B * p_.Hq * rows, [&] { return std::vector<char>(blocks); },
         [&](int64_t i, std::vector<char>& mask) {
           mark(choices[i / rows], i / rows, i % rows, mask);
           int32_t n = 0;
           for (int64_t c = 0; c < grid_.visible(i % rows); ++c)
             if (mask[c]) indices[i * blocks + n++] = static_cast<int32_t>(c);
           counts[i] = n;
           std::fill(indices + i * blocks + n, indices + (i + 1) * blocks, 0);
         });
  }

 private:
  void mean_blocks() {
    const int64_t blocks = grid_.blocks();
    mean_key_.resize(p_.B * p_.Hkv * blocks * p_.D);
    deal(p_.B * p_.Hkv * blocks, [] { return 0; }, [&](int64_t i, int) {
      const int64_t head = i / blocks, begin = i % blocks * p_.block;
      kernel_.mean(p_, true, head / p_.Hkv, head % p_.Hkv, begin,
                   std::min(p_.Tk, begin + p_.block), &mean_key_[i * p_.D]);
    });
  }

  // Attention of the mean of queries [begin, end) to the means of blocks, weighted by their sizes.
  std::vector<float> pooled(int64_t head, int64_t begin, int64_t end, int64_t n_blocks) const {
    const int64_t b = head / p_.Hq, h = head % p_.Hq, kv = h / (p_.Hq / p_.Hkv);
    std::vector<float> mean(p_.D), scores(n_blocks);
    kernel_.mean(p_, false, b, h, begin, end, mean.data());
    kernel_.dots(p_, mean.data(), &mean_key_[(b * p_.Hkv + kv) * grid_.blocks() * p_.D], n_blocks,
                 scores.data());
    for (int64_t c = 0; c < n_blocks; ++c) {
      const int64_t size = std::min(p_.block, p_.Tk - c * p_.block);
      scores[c] = scores[c] * p_.scale + std::log(static_cast<float>(size));
    }
    softmax(scores);
    return scores;
  }

  std::vector<float> estimate(int64_t head) const {
    return pooled(head, p_.Tq - p_.probe, p_.Tq, grid_.blocks());
  }

  void mark(const Choice& choice, int64_t head, int64_t r, std::vector<char>& mask) const {
    const int64_t visible = grid_.visible(r);
    std::fill(mask.begin(), mask.end(), 0);
    if (visible == 0) return;
    mask[0] = 1;
    for (int64_t c = std::max<int64_t>(grid_.first(r), 0) / p_.block; c < visible; ++c) mask[c] = 1;
    for (int32_t c : choice.columns) mask[c] = 1;
    for (int32_t bucket : choice.buckets) {
      const auto [from, to] = grid_.touched(r, bucket);
      for (int64_t c = from; c < to; ++c) mask[c] = 1;
    }
    if (!choice.query_aware) return;
    mark_query_aware(head, r, mask);
    if (r < (p_.Tq - p_.probe) / p_.block) return;
    for (int32_t c : choice.at_probe) mask[c] = 1;
  }

  void mark_query_aware(int64_t head, int64_t r, std::vector<char>& mask) const {
    const int64_t visible = grid_.visible(r);
    const std::vector<float> weights = pooled(
        head, r * p_.block, std::min(p_.Tq, (r + 1) * p_.block), visible);
    float held = 0;
    for (int64_t c = 0; c < visible; ++c)
      if (mask[c]) held += weights[c];
    for (int32_t c : ranking(weights)) {
      if (held >= options_.gamma || weights[c] == 0) break;
      if (mask[c]) continue;
      held += weights[c];
      mask[c] = 1;
    }
  }

  const Params& p_;
  const Options& options_;
  const ProbeKernel& kernel_;
  const Grid grid_;
  std::vector<float> mean_key_;  // [B, Hkv, Nk, D]
};

std::tuple<Tensor, Tensor, Tensor> flex_prefill_select(
    Tensor query, Tensor key, double gamma, double tau, int64_t min_budget,
    std::optional<int64_t> max_budget, int64_t block_size, std::string variant, bool causal,
    std::optional<double> scale) {
  check_flex_prefill_select(query, key, gamma, tau, min_budget, max_budget, block_size, variant,
                            causal, scale);
  SA_CHECK(query.is_cpu() && key.is_cpu(), "query, key: expected CPU tensors");
  query = last_dim_contiguous(query), key = last_dim_contiguous(key);
  const Params p = flex_prefill_params(query, key, block_size, scale);
  const int64_t rows = (p.Tq + block_size - 1) / block_size;
  const int64_t blocks = (p.Tk + block_size - 1) / block_size;
  const auto to_blocks = [&](int64_t tokens) {
    return std::min((std::min(tokens, p.Tk) + block_size - 1) / block_size, blocks);
  };
  const Options options{static_cast<float>(gamma), static_cast<float>(tau), to_blocks(min_budget),
                        max_budget ? to_blocks(*max_budget) : blocks};
  Tensor indices =
      torch::stable::new_empty(query, {p.B, p.Hq, rows, blocks}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(query, {p.B, p.Hq, rows}, ScalarType::Int);
  Tensor pattern = torch::stable::new_empty(query, {p.B, p.Hq}, ScalarType::Int);
  Selector(p, options, choose_kernel(p))
      .run(indices.mutable_data_ptr<int32_t>(), counts.mutable_data_ptr<int32_t>(),
           pattern.mutable_data_ptr<int32_t>());
  return {indices, counts, pattern};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) { m.impl("flex_prefill_select.cpp", TORCH_BOX(&flex_prefill_select)); }

}  // namespace sparse_attn
