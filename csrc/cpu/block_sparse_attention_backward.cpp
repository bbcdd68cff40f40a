// Driver: one pass over tiles of queries for dQ, one over tiles of keys for dK and dV. Each result
// is written by one thread, so the number of threads never changes it.
#include "block_sparse_attention_backward.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "block_sparse_attention_call.h"
#include "cpu_isa.h"
#include "query_runs.h"
#include "simd.h"

namespace sparse_attn {
namespace {

using Params = BlockSparseAttentionBackwardParams;

const AttentionBackwardKernel& choose_kernel() {
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::avx512) return kBackwardAvx512;
  if (cpu_isa() == CpuIsa::avx2) return kBackwardAvx2;
#endif
  return kBackwardPortable;
}

// reference and delta of every row; both stay 0 weight for rows that saw no key
void prepare_rows(const Params& p, const Tensor& out, const Tensor& lse, const Tensor* grad_lse,
                  float* reference, float* delta) {
  const auto* lses = lse.const_data_ptr<float>();
  const auto* grads = grad_lse == nullptr ? nullptr : grad_lse->const_data_ptr<float>();
  const auto* outs = static_cast<const char*>(out.const_data_ptr());
  const auto* grad_outs = static_cast<const char*>(p.grad_out);
  const int64_t bytes = element_bytes(p.dtype);
  torch::stable::parallel_for(0, p.B * p.Hq * p.Tq, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> a(p.Dv), b(p.Dv);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at[3] = {i / p.Tq / p.Hq, i / p.Tq % p.Hq, i % p.Tq};
      int64_t o = 0, g = 0, l = 0, e = 0;
      for (int x = 0; x < 3; ++x) {
        o += at[x] * out.stride(x), g += at[x] * p.grad_out_stride[x], l += at[x] * lse.stride(x);
        if (grads != nullptr) e += at[x] * grad_lse->stride(x);
      }
      const bool empty = lses[l] == -std::numeric_limits<float>::infinity();
      to_float(p.dtype, outs + o * bytes, a.data(), p.Dv);
      to_float(p.dtype, grad_outs + g * bytes, b.data(), p.Dv);
      float sum = grads == nullptr ? 0.0f : -grads[e];
      for (int64_t d = 0; d < p.Dv; ++d) sum += a[d] * b[d];
      delta[i] = empty ? 0.0f : sum;
      reference[i] = empty ? std::numeric_limits<float>::infinity() : lses[l];
    }
  });
}

std::vector<KeyTile> make_key_tiles(const Params& p) {
  const int64_t step = kMaxKeys / p.kv_block * p.kv_block;
  std::vector<KeyTile> tiles;
  // of a causal call the first keys are seen most: the order they are dealt in
  for (int64_t key = 0; key < p.Tk; key += step)
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t kv = 0; kv < p.Hkv; ++kv)
        tiles.push_back({b, kv, key, std::min(step, p.Tk - key)});
  return tiles;
}

template <class Rows>
struct State {
  Buffer scratch;
  Rows rows;
};

void run(const Params& p) {
  const AttentionBackwardKernel& kernel = choose_kernel();
  const int64_t scratch = kernel.scratch_bytes(p);
  const std::vector<Work> tiles = make_tiles(p, Sequences(p));
  deal(static_cast<int64_t>(tiles.size()), [&] { return State<KeyGroups>{allocate(scratch), {}}; },
       [&](int64_t i, State<KeyGroups>& state) {
         state.rows.build(p, tiles[i].tile);
         kernel.query_tile(p, tiles[i].tile, state.rows.data(), state.rows.size(),
                           state.scratch.get());
       });
  const std::vector<KeyTile> key_tiles = make_key_tiles(p);
  deal(static_cast<int64_t>(key_tiles.size()),
       [&] { return State<QueryRuns>{allocate(scratch), {}}; },
       [&](int64_t i, State<QueryRuns>& state) {
         state.rows.build(p, key_tiles[i]);
         kernel.key_tile(p, key_tiles[i], state.rows.data(), state.rows.size(),
                         state.scratch.get());
       });
}

void check_rows(const Tensor& query, const Tensor& value, const Tensor& x, const char* name,
                bool is_lse) {
  SA_CHECK(x.is_cpu(), name, ": expected a CPU tensor");
  SA_CHECK(x.dim() == (is_lse ? 3 : 4), name, ": expected ", is_lse ? 3 : 4, " dimensions");
  for (int i = 0; i < 3; ++i)
    SA_CHECK(x.size(i) == query.size(i), name, ": shape differs from query's");
  SA_CHECK(is_lse || x.size(3) == value.size(3), name, ": last dimension differs from value's");
  SA_CHECK(x.scalar_type() == (is_lse ? ScalarType::Float : query.scalar_type()), name,
           ": expected dtype ", is_lse ? "float32" : "of query");
}

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
    Tensor out, Tensor lse, Tensor indices, Tensor counts, int64_t q_block, int64_t kv_block,
    bool causal, int64_t sink, int64_t window, std::optional<double> scale) {
  check_cpu_call(query, key, value, indices, counts, q_block, kv_block, sink, window, scale);
  check_rows(query, value, grad_out, "grad_out", false);
  check_rows(query, value, out, "out", false);
  check_rows(query, value, lse, "lse", true);
  if (grad_lse.has_value()) check_rows(query, value, *grad_lse, "grad_lse", true);
  for (Tensor* t : {&query, &key, &value, &indices, &grad_out, &out}) *t = last_dim_contiguous(*t);
  Params p{};
  static_cast<BlockSparseAttentionParams&>(p) = make_params(
      query, key, value, indices, counts, q_block, kv_block, causal, sink, window, scale);
  check_index(p);
  p.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.grad_out_stride[i] = grad_out.stride(i);
  Tensor grad_query = torch::stable::new_empty(query, {p.B, p.Hq, p.Tq, p.D});
  Tensor grad_key = torch::stable::new_empty(query, {p.B, p.Hkv, p.Tk, p.D});
  Tensor grad_value = torch::stable::new_empty(query, {p.B, p.Hkv, p.Tk, p.Dv});
  p.grad_query = grad_query.mutable_data_ptr(), p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  const Buffer rows = allocate(2 * p.B * p.Hq * p.Tq * sizeof(float));
  float *reference = floats(rows), *delta = reference + p.B * p.Hq * p.Tq;
  prepare_rows(p, out, lse, grad_lse.has_value() ? &*grad_lse : nullptr, reference, delta);
  p.reference = reference, p.delta = delta;
  run(p);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) {
  m.impl("block_sparse_attention_backward.cpp", TORCH_BOX(&block_sparse_attention_backward));
}

}  // namespace sparse_attn
