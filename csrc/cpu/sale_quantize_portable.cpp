#include "sale_quantize_rows.h"

namespace sparse_attn {

const QuantizeKernel kQuantizePortable = quantize_kernel();

}  // namespace sparse_attn
