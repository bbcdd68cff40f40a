// squeezed_lookup, and what its plan says.
#include "cuda/squeezed_lookup.cuh"
#include "cuda/squeezed_lookup_plan.h"
#include "simt/ops/common.h"

namespace sparse_attn {
namespace {

SqueezedLevel level_of(const simt::Arguments& a, const std::string& prefix, const char* offsets) {
  const auto &centroids = a.tensor(prefix + "centroids"), &ends = a.tensor(offsets);
  const auto& log_counts = a.tensor(prefix + "log_counts");
  SqueezedLevel level{};
  level.centroids = centroids.data;
  level.log_counts = a.pointer<float>(prefix + "log_counts");
  level.offsets = a.pointer<int32_t>(offsets);
  level.threshold = a.pointer<float>(prefix + "threshold");
  strides(centroids, level.centroids_stride);
  for (int i = 0; i < 2; ++i) {
    level.log_counts_stride[i] = log_counts.strides[i];
    level.offsets_stride[i] = ends.strides[i];
  }
  if (centroids.sizes[0] == 1)
    level.centroids_stride[0] = level.log_counts_stride[0] = level.offsets_stride[0] = 0;
  level.K = centroids.sizes[2];
  return level;
}

SqueezedLookupCudaParams params(const simt::Arguments& a) {
  SqueezedLookupCudaParams p{};
  auto& c = p.call;
  const auto& query = a.tensor("query");
  c.query = query.data, c.fine = level_of(a, "", "offsets");
  if (a.tensors.count("coarse_centroids") != 0) c.coarse = level_of(a, "coarse_", "children");
  strides(query, c.query_stride);
  c.B = query.sizes[0], c.Hq = query.sizes[1], c.Tq = query.sizes[2], c.D = query.sizes[3];
  c.Hkv = a.tensor("centroids").sizes[1], c.Hd = a.number("shared") != 0 ? c.Hkv : c.Hq;
  c.runs = (c.fine.K + 1) / 2;
  c.scale = static_cast<float>(a.number("scale", 1 / std::sqrt(static_cast<double>(c.D))));
  c.dtype = dtype(a);
  c.starts = a.pointer<int32_t>("starts"), c.sums = a.pointer<int32_t>("sums");
  c.counts = a.pointer<int32_t>("counts"), c.tokens = a.pointer<int32_t>("tokens");
  return p;
}

template <class T>
void run_as(const simt::Arguments& given) {
  simt::Arguments a = given;
  SqueezedLookupCudaParams params_ = params(a);
  const SqueezedLookupPlan plan = plan_squeezed_lookup(params_, limits(a));
  const auto bytes = static_cast<size_t>(place_squeezed_lookup_buffers(params_, plan, nullptr));
  const simt::Workspace workspace(a, "workspace", bytes);
  place_squeezed_lookup_buffers(params_, plan, a.pointer<char>("workspace"));
  each_squeezed_lookup_launch(
      params_, plan,
      [&]<int kDim, int kRows, int kMode>(const LaunchPlan& how,
                                                 const SqueezedLookupCudaParams& p) {
        launch<cluster_scores_kernel<T, kDim, kRows, kMode>>(a, how, p);
      },
      [&](const LaunchPlan& how, const SqueezedLookupCudaParams& p) {
        launch<choose_clusters_kernel>(a, how, p);
      });
}

void run(const simt::Arguments& a) {
  switch (dtype(a)) {
    case DType::f16: run_as<__half>(a); break;
    case DType::bf16: run_as<__nv_bfloat16>(a); break;
    case DType::f32: throw std::runtime_error("no float32");
  }
}

void show_plan(const simt::Arguments& a) {
  SqueezedLookupCudaParams p = params(a);
  const SqueezedLookupPlan plan = plan_squeezed_lookup(p, limits(a));
  place_squeezed_lookup_buffers(p, plan, a.pointer<char>("scratch"));
  a.give("params", p), a.give("plan", plan);
}

const simt::Register register_run("squeezed_lookup", run);
const simt::Register register_plan("squeezed_lookup_plan", show_plan);

}  // namespace
}  // namespace sparse_attn
