// Scores of clusters with AVX512-BF16.
#if defined(__x86_64__)
#include "block_sparse_attention_decode_bf16.h"
#include "squeezed_lookup_kernel.h"

namespace sparse_attn {
namespace {

template <int kRows>
using Math = Bf16Math<kRows, /*kFetch=*/false>;

void score(const SqueezedLookupParams& p, const ScoreTask& t, void* scratch,
           float* const* logits) {
  switch (t.n_rows) {
    case 1: return score_with<Math<1>>(p, t, scratch, logits);
    case 2: return score_with<Math<2>>(p, t, scratch, logits);
    case 3: return score_with<Math<3>>(p, t, scratch, logits);
    case 4: return score_with<Math<4>>(p, t, scratch, logits);
    case 5: return score_with<Math<5>>(p, t, scratch, logits);
    case 6: return score_with<Math<6>>(p, t, scratch, logits);
    case 7: return score_with<Math<7>>(p, t, scratch, logits);
    default: return score_with<Math<8>>(p, t, scratch, logits);
  }
}

}  // namespace

const LookupKernel kLookupAvx512Bf16 = {8, lookup_scratch_bytes, score, log_sum, add_shares};

}  // namespace sparse_attn
#endif
