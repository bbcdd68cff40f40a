#if defined(__x86_64__)
#include "flex_prefill_select_probe.h"

namespace sparse_attn {

const ProbeKernel kProbeAvx2 = probe_kernel<FloatScorer>();

}  // namespace sparse_attn
#endif
