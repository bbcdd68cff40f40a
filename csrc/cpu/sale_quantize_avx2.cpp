#if defined(__x86_64__)
#include "sale_quantize_rows.h"

namespace sparse_attn {

const QuantizeKernel kQuantizeAvx2 = quantize_kernel();

}  // namespace sparse_attn
#endif
