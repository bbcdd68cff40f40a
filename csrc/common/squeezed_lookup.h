// The checks of squeezed_lookup and its parameters, for the bindings of every device.
#pragma once
#include <cmath>
#include <optional>
#include <string>

#include "stable.h"

namespace sparse_attn {

// The tensors of one level, and what they are called.
struct LevelTensors {
  Tensor centroids, log_counts, offsets, threshold;
  const char *centroids_name, *offsets_name;
};

// A call through torch.ops has not been checked by anybody.
inline void check_level(const Tensor& query, const LevelTensors& level) {
  const Tensor &c = level.centroids, &n = level.log_counts, &o = level.offsets;
  SA_CHECK(c.dim() == 4 && c.numel() > 0, level.centroids_name,
           ": expected [C, Hkv, K, D], not empty");
  SA_CHECK(c.scalar_type() == query.scalar_type(), level.centroids_name,
           ": dtype differs from query's");
  SA_CHECK((c.size(0) == 1 || c.size(0) == query.size(0)) && c.size(3) == query.size(3),
           level.centroids_name, ": batch size or head_dim do not fit the query");
  SA_CHECK(query.size(1) % c.size(1) == 0, "query: heads are no multiple of ",
           level.centroids_name, "'s");
  SA_CHECK(n.dim() == 3 && n.scalar_type() == ScalarType::Float && n.size(0) == c.size(0) &&
               n.size(1) == c.size(1) && n.size(2) == c.size(2),
           "log_counts: expected float32 of ", level.centroids_name, "'s shape without D");
  SA_CHECK(o.dim() == 3 && o.scalar_type() == ScalarType::Int && o.size(0) == c.size(0) &&
               o.size(1) == c.size(1) && o.size(2) == c.size(2) + 1,
           level.offsets_name, ": expected int32, one more per head than ", level.centroids_name);
  SA_CHECK(level.threshold.dim() == 0 && level.threshold.scalar_type() == ScalarType::Float,
           "threshold: expected a float32 tensor without dimensions");
}

inline SqueezedLevel squeezed_level(const LevelTensors& t) {
  SqueezedLevel level{};
  level.centroids = t.centroids.const_data_ptr();
  level.log_counts = t.log_counts.const_data_ptr<float>();
  level.offsets = t.offsets.const_data_ptr<int32_t>();
  level.threshold = t.threshold.const_data_ptr<float>();
  const bool shared = t.centroids.size(0) == 1;
  for (int i = 0; i < 3; ++i) level.centroids_stride[i] = t.centroids.stride(i);
  for (int i = 0; i < 2; ++i) {
    level.log_counts_stride[i] = t.log_counts.stride(i);
    level.offsets_stride[i] = t.offsets.stride(i);
  }
  if (shared)
    level.centroids_stride[0] = level.log_counts_stride[0] = level.offsets_stride[0] = 0;
  level.K = t.centroids.size(2);
  return level;
}

// All but the results; the tensors must outlive what is returned.
inline SqueezedLookupParams squeezed_lookup_params(const Tensor& query, const LevelTensors& fine,
                                                   const LevelTensors* coarse, bool shared,
                                                   std::optional<double> scale) {
  SA_CHECK(query.dim() == 4 && query.numel() > 0, "query: expected [B, Hq, Tq, D], not empty");
  SqueezedLookupParams p{};
  p.dtype = dtype_of(query, "query");
  check_level(query, fine);
  check_scale(scale);
  p.fine = squeezed_level(fine);
  if (coarse != nullptr) {
    check_level(query, *coarse);
    SA_CHECK(coarse->centroids.size(0) == fine.centroids.size(0) &&
                 coarse->centroids.size(1) == fine.centroids.size(1),
             "coarse_centroids: batch size or heads differ from those of centroids");
    p.coarse = squeezed_level(*coarse);
  }
  p.query = query.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.query_stride[i] = query.stride(i);
  p.B = query.size(0), p.Hq = query.size(1), p.Tq = query.size(2), p.D = query.size(3);
  p.Hkv = fine.centroids.size(1);
  p.Hd = shared ? p.Hkv : p.Hq;
  p.runs = (p.fine.K + 1) / 2;
  p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D))));
  return p;
}

}  // namespace sparse_attn
