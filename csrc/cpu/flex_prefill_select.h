// What the driver (flex_prefill_select.cpp) and the probe kernels of each instruction set share.
#pragma once
#include <cstdint>

#include "../common/params.h"

namespace sparse_attn {

constexpr int kProbeLanes = 128;    // probe rows, padded
constexpr int64_t kProbeKeys = 2048;  // keys per task

// Keys [begin, end) of one query head; `end` - `begin` <= kProbeKeys, `begin` a multiple of 32.
struct ProbeTask {
  int64_t batch, head, begin, end;

  int64_t keys() const { return end - begin; }
};

// Distances of a task: entry i of a slash array is distance first_distance + i.
inline int64_t first_distance(const FlexPrefillParams& p, const ProbeTask& t) {
  return p.Tk - p.probe - (t.end - 1);
}
constexpr int64_t kSlashLength = kProbeKeys + kProbeLanes;

// The probe's softmax: weight[lane] * 2^(score - max[lane]), scores in units of log2.
struct ProbeSoftmax {
  const float* max;
  const float* weight;
};

struct ProbeKernel {
  int64_t (*scratch_bytes)(const FlexPrefillParams&);
  // largest score and sum of 2^(score - max) per lane
  void (*extent)(const FlexPrefillParams&, const ProbeTask&, void* scratch, float* max, float* sum);
  // mass per key [keys] and per distance [kSlashLength]
  void (*profile)(const FlexPrefillParams&, const ProbeTask&, void* scratch, const ProbeSoftmax&,
                  float* vertical, float* slash);
  // splits the mass that is not free: per key `columns`, per distance `diagonals`. `vertical`
  // [keys] and `slash` [Tk, readable from first_distance on] are the profiles of the whole head;
  // keys in [own[lane], Tk) and [0, block) are free
  void (*attribute)(const FlexPrefillParams&, const ProbeTask&, void* scratch, const ProbeSoftmax&,
                    const float* vertical, const float* slash, const int32_t* own, float* columns,
                    float* diagonals);
  // out[d] = mean over rows [begin, end) of a head of query or key
  void (*mean)(const FlexPrefillParams&, bool of_key, int64_t batch, int64_t head, int64_t begin,
               int64_t end, float* out);
  // out[i] = dot of x [D] and rows[i] [D]
  void (*dots)(const FlexPrefillParams&, const float* x, const float* rows, int64_t n, float* out);
};

extern const ProbeKernel kProbeAmx;  // bf16 only
extern const ProbeKernel kProbeAvx512, kProbeAvx2, kProbePortable;

}  // namespace sparse_attn
