// The float32 gradient kernels, for every dtype and any vector width.
//
// A tile stands in SIMD lanes: queries with their output gradients for dQ, keys with their values
// for dK and dV. The other side passes by in chunks of rows. P and dS [row][lane] come from
//   S = rows_a * columns_a    P = exp(scale S - reference)
//   dP = rows_b * columns_b   dS = P (dP - delta)
// and the sums of a tile stay with it until they are final: nothing is added up by several threads.
#pragma once
#include "block_sparse_attention_backward.h"
#include "lanes.h"

namespace sparse_attn {
namespace {

using Params = BlockSparseAttentionBackwardParams;

constexpr int kChunk = 2 * kGroupKeys;  // rows whose scores are held at once
static_assert(kMaxKeys == kMaxRows);

struct BackwardScratch {
  float* columns_a;  // [kMaxRows / kLanes][D][kLanes] queries or keys
  float* columns_b;  // [kMaxRows / kLanes][Dv][kLanes] output gradients or values
  float* sums_a;     // as columns_a: dQ or dK
  float* sums_b;     // as columns_b: dV
  float* rows_a;     // [kChunk][D] keys or queries
  float* rows_b;     // [kChunk][Dv] values or output gradients
  float* weights;    // [kChunk][kLanes] S, then P
  float* grads;      // [kChunk][kLanes] dP, then dS
  float* reference;  // [kMaxRows]
  float* delta;      // [kMaxRows]
  float* hidden;     // [kChunk][kMaxKeys] 0 for a key that a run sees, -inf for others
  int32_t* position;  // [kMaxRows]

  static int64_t layout(const Params& p, char* base, BackwardScratch* s) {
    char* at = base;
    const auto take = [&at](auto*& pointer, int64_t elements) {
      pointer = reinterpret_cast<decltype(+pointer)>(at);
      at += round_up(elements * 4, 64);
    };
    BackwardScratch t;
    take(t.columns_a, kMaxRows * p.D);
    take(t.columns_b, kMaxRows * p.Dv);
    take(t.sums_a, kMaxRows * p.D);
    take(t.sums_b, kMaxRows * p.Dv);
    take(t.rows_a, kChunk * p.D);
    take(t.rows_b, kChunk * p.Dv);
    take(t.weights, kChunk * kLanes);
    take(t.grads, kChunk * kLanes);
    take(t.reference, kMaxRows);
    take(t.delta, kMaxRows);
    take(t.hidden, kChunk * kMaxKeys);
    take(t.position, kMaxRows);
    if (s != nullptr) *s = t;
    return at - base;
  }
};

int64_t backward_scratch_bytes(const Params& p) {
  return BackwardScratch::layout(p, nullptr, nullptr);
}

// Rows r < n of one tensor to lanes [n rounded up / kLanes][depth][kLanes]; empty lanes are 0.
template <class RowOf>
inline void load_columns(DType dtype, RowOf row_of, int64_t n, int64_t depth, float* row,
                         float* columns) {
  std::memset(columns, 0, round_up(n, kLanes) * depth * sizeof(float));
  for (int64_t r = 0; r < n; ++r) {
    to_float(dtype, row_of(r), row, depth);
    float* to = columns + r / kLanes * depth * kLanes + r % kLanes;
    for (int64_t d = 0; d < depth; ++d) to[d * kLanes] = row[d];
  }
}

// Lane r of the sums, times `scale`, to row `at` of a contiguous [.., depth] tensor.
inline void store_column(DType dtype, const float* sums, int64_t r, int64_t depth, float scale,
                         void* to, int64_t at) {
  const float* from = sums + r / kLanes * depth * kLanes + r % kLanes;
  for (int64_t d = 0; d < depth; ++d)
    from_float(dtype, scale * from[d * kLanes], to, at * depth + d);
}

// S and dP of one row to P and dS.
inline void to_gradients(float* weights, float* grads, const Vec (&reference)[2],
                         const Vec (&delta)[2], Vec scale) {
  for (int v = 0; v < 2; ++v) {
    const Vec s = Vec::load(weights + v * kWidth);
    const Vec e = Vec::fma(s, scale, Vec::zero() - reference[v]) * Vec::set(1.44269504088896341f);
    const Vec p = Vec::select(Vec::differ(s, Vec::set(-INFINITY)), exp2(e), Vec::zero());
    p.store(weights + v * kWidth);
    (p * (Vec::load(grads + v * kWidth) - delta[v])).store(grads + v * kWidth);
  }
}

void query_tile(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                void* scratch) {
  BackwardScratch s;
  BackwardScratch::layout(p, static_cast<char*>(scratch), &s);
  const int64_t rows = tile.rows(), blocks = (rows + kLanes - 1) / kLanes;
  const Vec scale = Vec::set(p.scale);
  const auto head = [&](int64_t r) { return tile.head + r / tile.queries; };
  const auto query = [&](int64_t r) { return tile.query + r % tile.queries; };
  const auto row_of = [&](const void* base, const int64_t stride[3]) {
    return [&, base, stride](int64_t r) {
      return element(p.dtype, base, stride, tile.batch, head(r), query(r));
    };
  };
  load_columns(p.dtype, row_of(p.query, p.query_stride), rows, p.D, s.rows_a, s.columns_a);
  load_columns(p.dtype, row_of(p.grad_out, p.grad_out_stride), rows, p.Dv, s.rows_b, s.columns_b);
  std::memset(s.sums_a, 0, blocks * kLanes * p.D * sizeof(float));
  int32_t lowest[kMaxRows / kLanes], highest[kMaxRows / kLanes];
  for (int64_t r = 0; r < blocks * kLanes; ++r) {
    // empty lanes repeat the last row, so that they never force a mask
    const int64_t real = r < rows ? r : rows - 1;
    const int64_t at = (tile.batch * p.Hq + head(real)) * p.Tq + query(real);
    s.reference[r] = p.reference[at], s.delta[r] = p.delta[at];
    const auto position = static_cast<int32_t>(p.Tk - p.Tq + query(real));
    s.position[r] = position;
    int32_t &low = lowest[r / kLanes], &high = highest[r / kLanes];
    if (r % kLanes == 0) low = high = position;
    if (position < low) low = position;
    if (position > high) high = position;
  }
  for (int64_t g = 0; g < n; ++g) {
    int32_t first, last;
    span_of(groups[g], &first, &last);
    for (int k = 0; k < kGroupKeys; ++k) {
      const int64_t t = groups[g].tokens == nullptr ? groups[g].first + k : groups[g].tokens[k];
      to_float(p.dtype, element(p.dtype, p.key, p.key_stride, tile.batch, tile.kv_head, t),
               s.rows_a + k * p.D, p.D);
      to_float(p.dtype, element(p.dtype, p.value, p.value_stride, tile.batch, tile.kv_head, t),
               s.rows_b + k * p.Dv, p.Dv);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      if (p.causal && first > highest[block]) continue;
      const int64_t lane = block * kLanes;
      dot_rows(s.rows_a, p.D, kGroupKeys, p.D, s.columns_a + lane * p.D, s.weights);
      dot_rows(s.rows_b, p.Dv, kGroupKeys, p.Dv, s.columns_b + lane * p.Dv, s.grads);
      if (groups[g].everyone != ~0u || (p.causal && last > lowest[block]))
        mask_keys(p, groups[g], s.position + lane, s.weights);
      Vec reference[2], delta[2];
      for (int v = 0; v < 2; ++v) {
        reference[v] = Vec::load(s.reference + lane + v * kWidth);
        delta[v] = Vec::load(s.delta + lane + v * kWidth);
      }
      for (int k = 0; k < kGroupKeys; ++k)
        to_gradients(s.weights + k * kLanes, s.grads + k * kLanes, reference, delta, scale);
      add_rows(s.rows_a, p.D, kGroupKeys, p.D, s.grads, s.sums_a + lane * p.D);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    store_column(p.dtype, s.sums_a, r, p.D, p.scale, p.grad_query,
                 (tile.batch * p.Hq + head(r)) * p.Tq + query(r));
}

class KeyGradient {
 public:
  KeyGradient(const Params& p, const KeyTile& tile, void* scratch)
      : p_(p), tile_(tile), scale_(Vec::set(p.scale)) {
    BackwardScratch::layout(p, static_cast<char*>(scratch), &s_);
    blocks_ = (tile.keys + kLanes - 1) / kLanes;
    const auto row_of = [&](const void* base, const int64_t stride[3]) {
      return [&p, &tile, base, stride](int64_t r) {
        return element(p.dtype, base, stride, tile.batch, tile.kv_head, tile.key + r);
      };
    };
    load_columns(p.dtype, row_of(p.key, p.key_stride), tile.keys, p.D, s_.rows_a, s_.columns_a);
    load_columns(p.dtype, row_of(p.value, p.value_stride), tile.keys, p.Dv, s_.rows_b,
                 s_.columns_b);
    std::memset(s_.sums_a, 0, blocks_ * kLanes * p.D * sizeof(float));
    std::memset(s_.sums_b, 0, blocks_ * kLanes * p.Dv * sizeof(float));
    for (int64_t r = 0; r < blocks_ * kLanes; ++r)
      s_.position[r] = static_cast<int32_t>(tile.key + (r < tile.keys ? r : tile.keys - 1));
  }

  void run(const QueryRun* runs, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
      for (int32_t begin = 0; begin < runs[i].queries;) {
        const int32_t room = kChunk - rows_, left = runs[i].queries - begin;
        const int32_t count = left < room ? left : room;
        load(runs[i], begin, count);
        begin += count;
        if (rows_ == kChunk) flush();
      }
    flush();
  }

  void finish() {
    for (int64_t r = 0; r < tile_.keys; ++r) {
      const int64_t at = (tile_.batch * p_.Hkv + tile_.kv_head) * p_.Tk + tile_.key + r;
      store_column(p_.dtype, s_.sums_a, r, p_.D, p_.scale, p_.grad_key, at);
      store_column(p_.dtype, s_.sums_b, r, p_.Dv, 1.0f, p_.grad_value, at);
    }
  }

 private:
  // Appends queries [begin, begin + count) of a run to the chunk.
  void load(const QueryRun& run, int32_t begin, int32_t count) {
    Part& part = parts_[n_parts_];
    part.run = &run;
    part.begin = rows_, part.end = rows_ + count;
    part.position = static_cast<int32_t>(p_.Tk - p_.Tq + run.query + begin);
    float* hidden = s_.hidden + n_parts_ * kMaxKeys;
    for (int j = 0; j < kMaxKeys; ++j)
      hidden[j] = run.seen[j / 32] >> j % 32 & 1 ? 0.0f : -INFINITY;
    ++n_parts_;
    for (int32_t i = 0; i < count; ++i, ++rows_) {
      const int64_t query = run.query + begin + i;
      to_float(p_.dtype, element(p_.dtype, p_.query, p_.query_stride, tile_.batch, run.head, query),
               s_.rows_a + rows_ * p_.D, p_.D);
      to_float(p_.dtype, element(p_.dtype, p_.grad_out, p_.grad_out_stride, tile_.batch, run.head,
                                 query), s_.rows_b + rows_ * p_.Dv, p_.Dv);
      const int64_t at = (tile_.batch * p_.Hq + run.head) * p_.Tq + query;
      s_.reference[rows_] = p_.reference[at], s_.delta[rows_] = p_.delta[at];
    }
  }

  void flush() {
    for (int64_t block = 0; block < blocks_ && rows_ > 0; ++block) step(block);
    rows_ = n_parts_ = 0;
  }

  void step(int64_t block) {
    const int64_t lane = block * kLanes;
    const int64_t end = lane + kLanes < tile_.keys ? lane + kLanes : tile_.keys;
    const auto first = static_cast<int32_t>(tile_.key + lane);
    const auto last = static_cast<int32_t>(tile_.key + end - 1);
    // the rows from the first to the last part that sees one of the lanes
    int begin = kChunk, stop = 0;
    bool whole[kChunk];
    for (int i = 0; i < n_parts_; ++i) {
      const Part& part = parts_[i];
      int64_t seen = 0;
      for (int64_t j = lane; j < end; ++j) seen += part.run->seen[j / 32] >> j % 32 & 1;
      whole[i] = seen == end - lane && (!p_.causal || last <= part.position);
      const int32_t top = part.position + part.end - part.begin - 1;
      if ((seen == 0 && !part.run->window) || (p_.causal && first > top)) continue;
      if (part.begin < begin) begin = part.begin;
      stop = part.end;
    }
    if (begin >= stop) return;
    const int n = stop - begin;
    const float *rows_a = s_.rows_a + begin * p_.D, *rows_b = s_.rows_b + begin * p_.Dv;
    float *weights = s_.weights + begin * kLanes, *grads = s_.grads + begin * kLanes;
    dot_rows(rows_a, p_.D, n, p_.D, s_.columns_a + lane * p_.D, weights);
    dot_rows(rows_b, p_.Dv, n, p_.Dv, s_.columns_b + lane * p_.Dv, grads);
    for (int i = 0; i < n_parts_; ++i)
      if (!whole[i] && parts_[i].begin >= begin && parts_[i].end <= stop) mask(i, lane);
    for (int r = begin; r < stop; ++r) {
      const Vec reference = Vec::set(s_.reference[r]), delta = Vec::set(s_.delta[r]);
      to_gradients(s_.weights + r * kLanes, s_.grads + r * kLanes, {reference, reference},
                   {delta, delta}, scale_);
    }
    add_rows(rows_a, p_.D, n, p_.D, grads, s_.sums_a + lane * p_.D);
    add_rows(rows_b, p_.Dv, n, p_.Dv, weights, s_.sums_b + lane * p_.Dv);
  }

  // Scores of keys that a query may not see become -inf.
  void mask(int i, int64_t lane) {
    const Part& part = parts_[i];
    for (int r = part.begin; r < part.end; ++r) {
      const int32_t position = part.position + r - part.begin;
      for (int v = 0; v < 2; ++v) {
        const int32_t* key = s_.position + lane + v * kWidth;
        float* at = s_.weights + r * kLanes + v * kWidth;
        const Vec score = Vec::load(at), never = Vec::set(-INFINITY);
        const Vec seen = score + Vec::load(s_.hidden + i * kMaxKeys + lane + v * kWidth);
        Vec x = Vec::select(Vec::within(key, 0, p_.causal ? position : INT32_MAX), seen, never);
        if (part.run->window) {
          const auto low = static_cast<int32_t>(position - p_.window + 1);
          x = Vec::select(Vec::within(key, low, position), score, x);
        }
        x.store(at);
      }
    }
  }

  // Rows [begin, end) of the chunk are consecutive queries of one run, the first at `position`.
  struct Part {
    const QueryRun* run;
    int begin, end;
    int32_t position;
  };

  const Params& p_;
  const KeyTile& tile_;
  const Vec scale_;
  BackwardScratch s_;
  int64_t blocks_;
  Part parts_[kChunk];
  int n_parts_ = 0, rows_ = 0;
};

void key_tile(const Params& p, const KeyTile& tile, const QueryRun* runs, int64_t n,
              void* scratch) {
  KeyGradient gradient(p, tile, scratch);
  gradient.run(runs, n);
  gradient.finish();
}

}  // namespace
}  // namespace sparse_attn
