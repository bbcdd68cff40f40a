#include "squeezed_lookup_float.h"

namespace sparse_attn {

const LookupKernel kLookupPortable = {4, lookup_scratch_bytes, score, log_sum, add_shares};

}  // namespace sparse_attn
