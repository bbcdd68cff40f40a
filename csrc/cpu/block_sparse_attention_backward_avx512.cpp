#if defined(__x86_64__)
#include "block_sparse_attention_backward_float.h"

namespace sparse_attn {

const AttentionBackwardKernel kBackwardAvx512 = {backward_scratch_bytes, query_tile, key_tile};

}  // namespace sparse_attn
#endif
