#if defined(__x86_64__)
#include "squeezed_lookup_float.h"

namespace sparse_attn {

const LookupKernel kLookupAvx512 = {4, lookup_scratch_bytes, score, log_sum, add_shares};

}  // namespace sparse_attn
#endif
