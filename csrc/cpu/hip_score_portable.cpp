#include "hip_score_float.h"

namespace sparse_attn {

const HipScoreKernel kHipScorePortable = float_score_kernel();

}  // namespace sparse_attn
