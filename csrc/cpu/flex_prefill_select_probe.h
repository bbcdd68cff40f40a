// The probe of FlexPrefill: exact attention of the last queries, summed by key and by distance.
//
// Probe rows stand in SIMD lanes. Scores are computed anew in each pass instead of being stored:
// that costs less than moving them, and needs no memory that grows with the length.
#pragma once
#include "block_sparse_attention_float.h"
#include "flex_prefill_select.h"

namespace sparse_attn {
namespace {

constexpr int kVectors = kProbeLanes / kWidth;

// Scores in float32: converts keys of other dtypes first.
class FloatScorer {
 public:
  static int64_t scratch_bytes(const FlexPrefillParams& p) {
    return (kProbeLanes + kGroupKeys) * round_up(p.D, 16) * static_cast<int64_t>(sizeof(float));
  }

  FloatScorer(const FlexPrefillParams& p, const ProbeTask& t, void* scratch) : p_(p), t_(t) {
    q_ = static_cast<float*>(scratch);
    keys_ = q_ + kProbeLanes * p.D;
    std::memset(q_, 0, kProbeLanes * p.D * sizeof(float));
    for (int64_t r = 0; r < p.probe; ++r) {
      to_float(p.dtype, element(p.dtype, p.query, p.query_stride, t.batch, t.head,
                                p.Tq - p.probe + r), keys_, p.D);
      float* q = q_ + r / kLanes * p.D * kLanes + r % kLanes;
      for (int64_t d = 0; d < p.D; ++d) q[d * kLanes] = keys_[d];
    }
  }

  // scores [32 keys][kProbeLanes] of keys first .. first + 31, rows beyond Tk zero
  void operator()(int64_t first, float* scores) {
    constexpr int kRows = kWidth == 16 ? 8 : 4;
    for (int k = 0; k < kGroupKeys; ++k) {
      float* to = keys_ + k * p_.D;
      if (first + k < p_.Tk)
        to_float(p_.dtype, element(p_.dtype, p_.key, p_.key_stride, t_.batch,
                                   t_.head / (p_.Hq / p_.Hkv), first + k), to, p_.D);
      else
        std::memset(to, 0, p_.D * sizeof(float));
    }
    for (int lane = 0; lane < kProbeLanes; lane += kLanes) {
      for (int k = 0; k < kGroupKeys; k += kRows) {
        Vec c[kRows][2];
        for (auto& x : c) x[0] = x[1] = Vec::zero();
        const float* key = keys_ + k * p_.D;
        const int64_t stride = p_.D;
        multiply(c, [=](int r, int64_t d) { return key[r * stride + d]; }, q_ + lane * p_.D, p_.D);
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < 2; ++v)
            c[r][v].store(scores + (k + r) * kProbeLanes + lane + v * kWidth);
      }
    }
  }

 private:
  const FlexPrefillParams& p_;
  const ProbeTask& t_;
  float *q_, *keys_;
};

template <class Scorer>
struct Probe {
  static constexpr int64_t kDiagonals = (kProbeKeys + kProbeLanes) / kWidth + 1;

  struct Buffers {
    void* scorer;
    float* scores;     // [32][kProbeLanes]
    float* skewed;     // [kWidth][kDiagonals * kWidth]: diagonal sums by key modulo kWidth
    int32_t* position; // [kProbeLanes]
  };

  static int64_t layout(const FlexPrefillParams& p, char* base, Buffers* b) {
    const int64_t scorer = round_up(Scorer::scratch_bytes(p), 64);
    const int64_t scores = kGroupKeys * kProbeLanes * 4;
    const int64_t skewed = round_up(kWidth * kDiagonals * kWidth * 4, 64);
    if (b != nullptr) {
      b->scorer = base;
      b->scores = reinterpret_cast<float*>(base + scorer);
      b->skewed = reinterpret_cast<float*>(base + scorer + scores);
      b->position = reinterpret_cast<int32_t*>(base + scorer + scores + skewed);
      for (int i = 0; i < kProbeLanes; ++i)
        b->position[i] = static_cast<int32_t>(p.Tk - p.probe + (i < p.probe ? i : p.probe - 1));
    }
    return scorer + scores + skewed + kProbeLanes * 4;
  }

  static int64_t scratch_bytes(const FlexPrefillParams& p) { return layout(p, nullptr, nullptr); }

  // score in units of log2, -inf where the row may not see the key
  static Vec score(const Buffers& b, const FlexPrefillParams& p, int64_t key, const float* at,
                   int v, Vec factor) {
    const Vec s = Vec::load(at + v * kWidth) * factor;
    if (key <= p.Tk - p.probe) return s;
    return Vec::select(Vec::within(b.position + v * kWidth, static_cast<int32_t>(key), INT32_MAX),
                       s, Vec::set(-INFINITY));
  }

  // Calls body(key, scores of the key) for every key of the task.
  template <class Body>
  static void for_keys(const FlexPrefillParams& p, const ProbeTask& t, const Buffers& b,
                       Body body) {
    Scorer scorer(p, t, b.scorer);
    for (int64_t first = t.begin; first < t.end; first += kGroupKeys) {
      scorer(first, b.scores);
      for (int64_t k = first; k < t.end && k < first + kGroupKeys; ++k)
        body(k, b.scores + (k - first) * kProbeLanes);
    }
  }

  static float log2_factor(const FlexPrefillParams& p) { return p.scale * 1.44269504088896341f; }

  static void extent(const FlexPrefillParams& p, const ProbeTask& t, void* scratch, float* max,
                     float* sum) {
    Buffers b;
    layout(p, static_cast<char*>(scratch), &b);
    const Vec factor = Vec::set(log2_factor(p));
    for (int i = 0; i < kProbeLanes; ++i) max[i] = kNoKey, sum[i] = 0;
    for_keys(p, t, b, [&](int64_t key, const float* at) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec s = score(b, p, key, at, v, factor);
        Vec m = Vec::load(max + v * kWidth), l = Vec::load(sum + v * kWidth);
        const auto grown = Vec::greater(s, m);
        if (Vec::any(grown)) {
          const Vec raised = Vec::select(grown, s, m);
          l = l * exp2(m - raised);
          m = raised;
          m.store(max + v * kWidth);
        }
        (l + exp2(s - m)).store(sum + v * kWidth);
      }
    });
  }

  static float sum_of(Vec x) {
    float lanes[kWidth], sum = 0;
    x.store(lanes);
    for (int i = 0; i < kWidth; ++i) sum += lanes[i];
    return sum;
  }

  // Consecutive keys add to slash arrays that are shifted by one against each other. One array per
  // key modulo kWidth keeps each access aligned; `unskew` joins them.
  static float* skew_row(const Buffers& b, const ProbeTask& t, int64_t key) {
    const int64_t local = key - t.begin;
    return b.skewed + (local % kWidth) * kDiagonals * kWidth +
           (kProbeKeys / kWidth - 1 - local / kWidth) * kWidth;
  }

  static void clear_skewed(const Buffers& b) {
    std::memset(b.skewed, 0, kWidth * kDiagonals * kWidth * sizeof(float));
  }

  static void unskew(const FlexPrefillParams& p, const ProbeTask& t, const Buffers& b,
                     float* slash) {
    std::memset(slash, 0, kSlashLength * sizeof(float));
    for (int64_t r = 0; r < kWidth; ++r) {
      // entry y of array r is distance Tk - probe - begin - r - (kProbeKeys - kWidth) + y
      const int64_t shift = (p.Tk - p.probe - t.begin - r - (kProbeKeys - kWidth)) -
                            first_distance(p, t);
      const float* from = b.skewed + r * kDiagonals * kWidth;
      for (int64_t y = shift < 0 ? -shift : 0;
           y < kDiagonals * kWidth && y + shift < kSlashLength; ++y)
        slash[y + shift] += from[y];
    }
  }

  static void profile(const FlexPrefillParams& p, const ProbeTask& t, void* scratch,
                      const ProbeSoftmax& softmax, float* vertical, float* slash) {
    Buffers b;
    layout(p, static_cast<char*>(scratch), &b);
    clear_skewed(b);
    const Vec factor = Vec::set(log2_factor(p));
    for_keys(p, t, b, [&](int64_t key, const float* at) {
      float* skewed = skew_row(b, t, key);
      Vec total = Vec::zero();
      for (int v = 0; v < kVectors; ++v) {
        const Vec mass = exp2(score(b, p, key, at, v, factor) -
                              Vec::load(softmax.max + v * kWidth)) *
                         Vec::load(softmax.weight + v * kWidth);
        total = total + mass;
        (Vec::load(skewed + v * kWidth) + mass).store(skewed + v * kWidth);
      }
      vertical[key - t.begin] = sum_of(total);
    });
    unskew(p, t, b, slash);
  }

  static void attribute(const FlexPrefillParams& p, const ProbeTask& t, void* scratch,
                        const ProbeSoftmax& softmax, const float* vertical, const float* slash,
                        const int32_t* own, float* columns, float* diagonals) {
    Buffers b;
    layout(p, static_cast<char*>(scratch), &b);
    clear_skewed(b);
    const Vec factor = Vec::set(log2_factor(p)), least = Vec::set(1e-30f);
    for_keys(p, t, b, [&](int64_t key, const float* at) {
      columns[key - t.begin] = 0;
      if (key < p.block) return;
      float* skewed = skew_row(b, t, key);
      const float* at_distance = slash + (p.Tk - p.probe - key);
      const Vec v_mass = Vec::set(vertical[key - t.begin]);
      Vec total = Vec::zero();
      for (int v = 0; v < kVectors; ++v) {
        Vec mass = exp2(score(b, p, key, at, v, factor) - Vec::load(softmax.max + v * kWidth)) *
                   Vec::load(softmax.weight + v * kWidth);
        mass = Vec::select(Vec::within(own + v * kWidth, static_cast<int32_t>(key) + 1, INT32_MAX),
                           mass, Vec::zero());
        const Vec to_column =
            mass * (v_mass / Vec::max(v_mass + Vec::load(at_distance + v * kWidth), least));
        total = total + to_column;
        (Vec::load(skewed + v * kWidth) + (mass - to_column)).store(skewed + v * kWidth);
      }
      columns[key - t.begin] = sum_of(total);
    });
    unskew(p, t, b, diagonals);
  }
};

void mean(const FlexPrefillParams& p, bool of_key, int64_t batch, int64_t head, int64_t begin,
          int64_t end, float* out) {
  std::memset(out, 0, p.D * sizeof(float));
  constexpr int kPart = 64;
  float part[kPart];
  for (int64_t t = begin; t < end; ++t) {
    const char* row = of_key ? element(p.dtype, p.key, p.key_stride, batch, head, t)
                             : element(p.dtype, p.query, p.query_stride, batch, head, t);
    for (int64_t d = 0; d < p.D; d += kPart) {
      const int64_t n = p.D - d < kPart ? p.D - d : kPart;
      to_float(p.dtype, row + d * element_bytes(p.dtype), part, n);
      for (int64_t i = 0; i < n; ++i) out[d + i] += part[i];
    }
  }
  for (int64_t d = 0; d < p.D; ++d) out[d] /= static_cast<float>(end - begin);
}

void dots(const FlexPrefillParams& p, const float* x, const float* rows, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    Vec sum = Vec::zero();
    const float* row = rows + i * p.D;
    int64_t d = 0;
    for (; d + kWidth <= p.D; d += kWidth) sum = Vec::fma(Vec::load(x + d), Vec::load(row + d), sum);
    float total = Probe<FloatScorer>::sum_of(sum);
    for (; d < p.D; ++d) total += x[d] * row[d];
    out[i] = total;
  }
}

template <class Scorer>
constexpr ProbeKernel probe_kernel() {
  using P = Probe<Scorer>;
  return {P::scratch_bytes, P::extent, P::profile, P::attribute, mean, dots};
}

}  // namespace
}  // namespace sparse_attn
