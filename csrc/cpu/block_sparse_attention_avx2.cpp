#if defined(__x86_64__)
#include "block_sparse_attention_decode_float.h"
#include "block_sparse_attention_float.h"

namespace sparse_attn {

const AttentionKernel kAttentionAvx2 = {nothing_packed, pack_nothing, float_scratch_bytes, float_tile};
const AttentionKernel kDecodeAvx2 = {nothing_packed, pack_nothing, decode_scratch_bytes, decode_tile};

}  // namespace sparse_attn
#endif
