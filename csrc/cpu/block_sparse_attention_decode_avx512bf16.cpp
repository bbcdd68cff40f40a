// Decoding with AVX512-BF16.
#if defined(__x86_64__)
#include "block_sparse_attention_decode_bf16.h"

namespace sparse_attn {
namespace {

void decode_tile(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
                 const void*, void* scratch, float* partial) {
  switch (tile.rows()) {
    case 1: return decode<Bf16Math<1>>(p, tile, groups, n, scratch, partial);
    case 2: return decode<Bf16Math<2>>(p, tile, groups, n, scratch, partial);
    case 3: return decode<Bf16Math<3>>(p, tile, groups, n, scratch, partial);
    case 4: return decode<Bf16Math<4>>(p, tile, groups, n, scratch, partial);
    case 5: return decode<Bf16Math<5>>(p, tile, groups, n, scratch, partial);
    case 6: return decode<Bf16Math<6>>(p, tile, groups, n, scratch, partial);
    case 7: return decode<Bf16Math<7>>(p, tile, groups, n, scratch, partial);
    default: return decode<Bf16Math<8>>(p, tile, groups, n, scratch, partial);
  }
}

}  // namespace

const AttentionKernel kDecodeAvx512Bf16 = {nothing_packed, pack_nothing, decode_scratch_bytes,
                                           decode_tile};

}  // namespace sparse_attn
#endif
