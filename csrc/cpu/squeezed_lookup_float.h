// Scores of clusters in float32, for every dtype and any vector width.
#pragma once
#include "block_sparse_attention_decode_float.h"
#include "squeezed_lookup_kernel.h"

namespace sparse_attn {
namespace {

template <DType kType>
void score_as_float(const SqueezedLookupParams& p, const ScoreTask& t, void* scratch,
                    float* const* logits) {
  switch (t.n_rows) {
    case 1: return score_with<FloatMath<kType, 1>>(p, t, scratch, logits);
    case 2: return score_with<FloatMath<kType, 2>>(p, t, scratch, logits);
    case 3: return score_with<FloatMath<kType, 3>>(p, t, scratch, logits);
    default: return score_with<FloatMath<kType, 4>>(p, t, scratch, logits);
  }
}

void score(const SqueezedLookupParams& p, const ScoreTask& t, void* scratch,
           float* const* logits) {
  switch (p.dtype) {
    case DType::f32: return score_as_float<DType::f32>(p, t, scratch, logits);
    case DType::f16: return score_as_float<DType::f16>(p, t, scratch, logits);
    case DType::bf16: return score_as_float<DType::bf16>(p, t, scratch, logits);
  }
}

}  // namespace
}  // namespace sparse_attn
