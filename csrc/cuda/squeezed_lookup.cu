// Binds squeezed_lookup to torch.
#include "squeezed_lookup.cuh"

#include <tuple>

#include "../common/squeezed_lookup.h"
#include "binding.h"
#include "squeezed_lookup_plan.h"

namespace sparse_attn {
namespace {

template <class T>
void run(const SqueezedLookupCudaParams& p, const SqueezedLookupPlan& plan, cudaStream_t stream) {
  each_squeezed_lookup_launch(
      p, plan,
      [&]<int kDim, int kRows, int kMode>(const LaunchPlan& how,
                                                 const SqueezedLookupCudaParams& level) {
        launch(cluster_scores_kernel<T, kDim, kRows, kMode>, how, stream, level);
      },
      [&](const LaunchPlan& how, const SqueezedLookupCudaParams& level) {
        launch(choose_clusters_kernel, how, stream, level);
      });
}

LevelTensors readable(const LevelTensors& level) {
  LevelTensors l = level;
  l.centroids = aligned_rows(l.centroids), l.log_counts = last_dim_contiguous(l.log_counts);
  l.offsets = last_dim_contiguous(l.offsets);
  return l;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> squeezed_lookup(
    Tensor query, Tensor centroids, Tensor log_counts, Tensor offsets, Tensor threshold,
    std::optional<Tensor> coarse_centroids, std::optional<Tensor> coarse_log_counts,
    std::optional<Tensor> children, std::optional<Tensor> coarse_threshold, bool shared,
    std::optional<double> scale) {
  LevelTensors fine{centroids, log_counts, offsets, threshold, "centroids", "offsets"};
  check_level(query, fine);
  check_same_device({{"query", query}, {"centroids", centroids}, {"log_counts", log_counts},
                     {"offsets", offsets}, {"threshold", threshold}});
  std::optional<LevelTensors> coarse;
  if (coarse_centroids.has_value()) {
    SA_CHECK(coarse_log_counts.has_value() && children.has_value() && coarse_threshold.has_value(),
             "coarse_log_counts, children, coarse_threshold: expected beside coarse_centroids");
    coarse = LevelTensors{*coarse_centroids, *coarse_log_counts, *children, *coarse_threshold,
                          "coarse_centroids", "children"};
    check_level(query, *coarse);
    check_same_device({{"query", query}, {"coarse_centroids", *coarse_centroids},
                       {"coarse_log_counts", *coarse_log_counts}, {"children", *children},
                       {"coarse_threshold", *coarse_threshold}});
    coarse = readable(*coarse);
  }
  SA_CHECK(query.size(3) % 8 == 0 && query.size(3) <= 256, "query: head_dim ", query.size(3),
           ", expected a multiple of 8 up to 256");
  const DeviceGuard guard(query.get_device_index());
  query = aligned_rows(query), fine = readable(fine);
  SqueezedLookupCudaParams p{squeezed_lookup_params(
      query, fine, coarse.has_value() ? &*coarse : nullptr, shared, scale)};
  const auto& c = p.call;
  Tensor starts = torch::stable::new_empty(query, {c.B, c.Hd, c.runs}, ScalarType::Int);
  Tensor sums = torch::stable::new_empty(query, {c.B, c.Hd, c.runs}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(query, {c.B, c.Hd}, ScalarType::Int);
  Tensor tokens = torch::stable::new_empty(query, {c.B, c.Hd}, ScalarType::Int);
  p.call.starts = starts.mutable_data_ptr<int32_t>();
  p.call.sums = sums.mutable_data_ptr<int32_t>();
  p.call.counts = counts.mutable_data_ptr<int32_t>();
  p.call.tokens = tokens.mutable_data_ptr<int32_t>();
  const SqueezedLookupPlan plan = plan_squeezed_lookup(p, limits_of(query));
  const int64_t bytes = place_squeezed_lookup_buffers(p, plan, nullptr);
  Tensor scratch = torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
  place_squeezed_lookup_buffers(p, plan, static_cast<char*>(scratch.mutable_data_ptr()));
  switch (c.dtype) {
    case DType::f16: run<__half>(p, plan, current_stream(query)); break;
    case DType::bf16: run<__nv_bfloat16>(p, plan, current_stream(query)); break;
    case DType::f32: SA_CHECK(false, "query: expected float16 or bfloat16");
  }
  return {starts, sums, counts, tokens};
}

}  // namespace

SA_LIBRARY_IMPL(CUDA, m) { m.impl("squeezed_lookup.cuda", TORCH_BOX(&squeezed_lookup)); }

}  // namespace sparse_attn
