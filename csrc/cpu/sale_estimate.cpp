// Driver of SALE's selection pass: query blocks that share keys make a task; lists are written last.
#include "sale_estimate.h"

#include <tuple>
#include <vector>

#include "../common/sale_estimate.h"
#include "cpu_isa.h"
#include "threads.h"

namespace sparse_attn {
namespace {

using Params = SaleEstimateParams;

const EstimateKernel& choose_kernel() {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::avx512) return kEstimateAvx512;
  if (isa == CpuIsa::avx2) return kEstimateAvx2;
#endif
  return kEstimatePortable;
}

// The blocks of keys that query block m sees: [0, sink) and [local, seen) are listed anyway.
struct Region {
  int64_t sink, local, seen;

  Region(const Params& p, int64_t m) {
    const int64_t first = p.Tk - p.Tq + m * p.q_block;
    const int64_t last = std::min(first + p.q_block, p.Tk) - 1;
    seen = last < 0 ? 0 : last / p.kv_block + 1;
    const int64_t own = std::max<int64_t>(first, 0) / p.kv_block;
    local = std::min(std::max<int64_t>(own - p.local_blocks + 1, 0), seen);
    sink = std::min(p.sink_blocks, local);
  }
};

// Query blocks of the heads of a KV head, late ones first: they take longest.
std::vector<EstimateTask> make_tasks(const Params& p) {
  const int64_t group = p.Hq / p.Hkv;
  std::vector<EstimateTask> tasks;
  for (int64_t m = p.Mq; m > 0;) {
    const int64_t rows = std::min<int64_t>(m, std::max<int64_t>(1, kMaxUnits / group));
    m -= rows;
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t kv = 0; kv < p.Hkv; ++kv) {
        for (int64_t i = 0; i < rows * group; ++i) {
          if (i % kMaxUnits == 0) tasks.push_back({b, kv, {}, 0});
          EstimateTask& task = tasks.back();
          const Region region(p, m + i / group);
          task.units[task.n++] = {kv * group + i % group, m + i / group, region.sink,
                                  region.local, nullptr};
        }
      }
    }
  }
  return tasks;
}

void list_blocks(const Params& p, const EstimateTask& task, const EstimateUnit& unit) {
  const Region region(p, unit.m);
  const int64_t row = (task.batch * p.Hq + unit.head) * p.Mq + unit.m;
  int32_t* to = p.indices + row * p.Nk;
  int32_t n = 0;
  for (int64_t c = 0; c < region.seen; ++c)
    if (c < region.sink || c >= region.local || unit.kept[c]) to[n++] = static_cast<int32_t>(c);
  p.counts[row] = n;
  std::fill(to + n, to + p.Nk, 0);
}

struct State {
  Buffer scratch;
  std::vector<uint8_t> kept;
};

void run(const Params& p, const EstimateKernel& kernel) {
  std::vector<EstimateTask> tasks = make_tasks(p);
  deal(static_cast<int64_t>(tasks.size()),
       [&] {
         return State{allocate(kernel.scratch_bytes(p)), std::vector<uint8_t>(kMaxUnits * p.Nk)};
       },
       [&](int64_t i, State& state) {
         EstimateTask& task = tasks[i];
         std::fill(state.kept.begin(), state.kept.end(), 0);
         for (int u = 0; u < task.n; ++u) task.units[u].kept = state.kept.data() + u * p.Nk;
         kernel.run(p, task, state.scratch.get());
         for (int u = 0; u < task.n; ++u) list_blocks(p, task, task.units[u]);
       });
}

std::tuple<Tensor, Tensor> sale_estimate(Tensor query_packed, Tensor query_step, Tensor key_packed,
                                         Tensor key_step, Tensor key_bias, Tensor theta,
                                         int64_t q_block, int64_t kv_block, int64_t local,
                                         int64_t sink) {
  SaleEstimateTensors t{query_packed, query_step, key_packed, key_step, key_bias, theta};
  check_sale_estimate(t, q_block, kv_block, local, sink);
  for (Tensor* x : {&t.query, &t.query_step, &t.key, &t.key_step, &t.key_bias, &t.theta})
    SA_CHECK(x->is_cpu(), "expected CPU tensors");
  for (Tensor* x : {&t.query, &t.key}) *x = last_dim_contiguous(*x);
  for (Tensor* x : {&t.query_step, &t.key_step, &t.key_bias, &t.theta})
    *x = torch::stable::contiguous(*x);
  Params p = sale_estimate_params(t, q_block, kv_block, local, sink);
  Tensor indices =
      torch::stable::new_empty(t.query, {p.B, p.Hq, p.Mq, p.Nk}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(t.query, {p.B, p.Hq, p.Mq}, ScalarType::Int);
  p.indices = indices.mutable_data_ptr<int32_t>(), p.counts = counts.mutable_data_ptr<int32_t>();
  run(p, choose_kernel());
  return {indices, counts};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) { m.impl("sale_estimate.cpp", TORCH_BOX(&sale_estimate)); }

}  // namespace sparse_attn
