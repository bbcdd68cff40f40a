#if defined(__x86_64__)
#include "hip_score_float.h"

namespace sparse_attn {

const HipScoreKernel kHipScoreAvx512 = float_score_kernel();

}  // namespace sparse_attn
#endif
